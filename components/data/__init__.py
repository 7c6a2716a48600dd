"""Lists of cases, images and labels, transforms, a training set of slices, and predictions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "acdc": ["read_acdc"],
        "cases": ["list_cases", "list_unlabelled"],
        "custom_data": ["DatasetStatistics", "patch_side", "read_data"],
        "prediction_writer": ["SavePredictiond"],
        "preprocessing": ["scaled_grey_values", "square_canvas"],
        "slices": ["SliceDataset"],
        "transforms": ["LeaveOutIgnoredd", "LoadVolumed", "RoundIntensityd"],
        "volume_search": ["VolumeDataset", "find_volumes"],
    },
)
