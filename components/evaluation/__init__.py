"""From a trained network to predictions, scores, tables and pictures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "frames": ["FrameStore"],
        "function_report": ["FunctionReport"],
        "metrics": ["VolumeAssdHandler", "VolumeDiceHandler"],
        "model_loader": ["ModelCheckpointLoader"],
        "overlays": ["SaveOverlayd"],
        "reports": ["EvaluationReport"],
        "segmentation": ["SegmentationEvaluator"],
        "slice_inferer": ["TurnedSliceInferer"],
    },
)
