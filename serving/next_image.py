"""Which image to label next: the arithmetic, without MONAI Label."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

import numpy as np


def lowest(values: Mapping[str, float]) -> str:
    """Return the name with the lowest value, the first by name among equals."""
    return min(sorted(values), key=values.__getitem__)


def most_different(unlabelled: Mapping[str, np.ndarray], labelled: Sequence[np.ndarray]) -> str:
    """Return the image farthest from all labelled ones, by the cosine distance to the nearest of them.

    Without a labelled image it is the one nearest to the mean of all.

    Source: greedy k-center, Sener and Savarese, "Active learning for convolutional neural networks: a core-set
    approach", ICLR 2018. Differs: cosine distance, and one image at a time.

    Args:
        unlabelled: embeddings (C,) by the image's name, one or more.
        labelled: embeddings (C,).

    Returns:
        the name, the first among equals.
    """
    names = sorted(unlabelled)
    directions = _directions([unlabelled[name] for name in names])
    if not labelled:
        return names[int((directions @ directions.mean(axis=0)).argmax())]
    return names[int((directions @ _directions(labelled).T).max(axis=1).argmin())]


def as_text(embedding: np.ndarray) -> str:
    """Return the direction of an embedding (C,) as text, in half precision; `from_text` reads it."""
    return base64.b64encode(_directions([embedding]).astype("<f2").tobytes()).decode()


def from_text(text: str) -> np.ndarray:
    """Return the embedding (C,) of `as_text`, of length 1."""
    return np.frombuffer(base64.b64decode(text), "<f2").astype(float)


def _directions(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Return vectors (C,) as rows of length 1; zeros stay."""
    rows = np.asarray(vectors, dtype=float)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
