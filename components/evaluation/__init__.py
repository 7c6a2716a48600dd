"""Scores, tables and pictures of predictions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "metrics": ["VolumeAssdHandler", "VolumeDiceHandler"],
        "overlays": ["SaveOverlayd"],
        "reports": ["EvaluationReport"],
    },
)
