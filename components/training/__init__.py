"""Additions to MONAI's trainer: checkpoints, averages of weights, seeded epochs, mixing of batches, records."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "averages": ["AverageUpdates", "ExponentialMovingAverage", "MeanWithStart"],
        "checkpoints": ["TrainingCheckpoints"],
        "command_line": ["check_run_id", "read_command_line"],
        "epoch_handlers": ["EpochSeeds", "LastEpochValidationHandler", "StepLimit", "TrainingProgressBar"],
        "known_pixels": ["KnownPixelsDiceCELoss"],
        "mean_teacher": ["PseudoLabelCutMix"],
        "phantom_mixing": ["PhantomMixing"],
        "tracking": ["finish_mlflow_runs"],
    },
)
