"""From files to slices: ACDC's layout, NIfTI volumes, DICOM studies, transforms, a training set of slices."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "acdc": ["list_cases", "list_unlabelled"],
        "dicom_seg": ["SaveDicomSegd"],
        "own_data": ["LabelledCases", "own_cases", "own_unlabelled", "read_data", "scaled_grey_values"],
        "slices": ["SliceDataset"],
        "transforms": [
            "CentralCropd",
            "LoadVolumed",
            "NeighbourSlicesd",
            "PadInPlaneToSquared",
            "RoundIntensityd",
            "SlicesLastd",
        ],
        "volumes": ["SavePredictiond", "VolumeDataset", "find_volumes"],
    },
)
