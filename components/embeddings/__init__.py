"""Embeddings of images, kept in memory and on disk so that a frozen encoder sees each image once."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cache": ["EmbeddingCacheReport"],
    },
)
