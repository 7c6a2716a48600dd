"""Label maps of volumes and cines, made by a trained network."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cine_buffer": ["CineBuffer"],
        "closed_wall": ["CloseWalld"],
        "correction": ["CorrectByClicksd", "check_clicks"],
        "lost_slices": ["FillLostSlicesd"],
        "model_loader": ["ModelCheckpointLoader"],
        "segmentation": ["SegmentationEvaluator"],
        "slice_inferer": ["TestTimeAugmentationInferer"],
        "valve": ["EndAtValved"],
    },
)
