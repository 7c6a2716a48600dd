"""From files to slices: ACDC's layout, NIfTI volumes, DICOM studies, transforms, a training set of slices."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "acdc": ["read_acdc"],
        "cases": ["list_cases", "list_unlabelled"],
        "dicom_seg": ["SaveDicomSegd"],
        "own_data": ["LabelledCases", "read_data"],
        "preprocessing": ["scaled_grey_values", "square_canvas"],
        "slices": ["SliceDataset"],
        "transforms": ["LoadVolumed", "RoundIntensityd"],
        "volumes": ["SavePredictiond", "VolumeDataset", "find_volumes"],
    },
)
