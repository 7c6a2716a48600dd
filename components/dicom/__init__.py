"""DICOM studies: their images, the stack of a short-axis cine, and segmentation objects."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "segmentation_object": ["SaveDicomSegd"],
    },
)
