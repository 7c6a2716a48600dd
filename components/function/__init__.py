"""Cardiac function: volumes, ejection fractions and wall thickness, checks of them, and a page for each case."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "report": ["FunctionReport"],
    },
)
