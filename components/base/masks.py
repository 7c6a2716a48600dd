"""Connected pieces of masks, and the pixels deep inside them."""

import numpy as np
from scipy import ndimage


def largest_piece(mask: np.ndarray) -> np.ndarray:
    """Return the largest connected piece of a mask HxW, as a mask; it is empty if the mask is."""
    pieces, count = ndimage.label(mask)
    return pieces == 1 + np.bincount(pieces.ravel())[1:].argmax() if count else np.zeros_like(mask, bool)


def pieces_at(mask: np.ndarray, rows: np.ndarray | int, columns: np.ndarray | int) -> np.ndarray:
    """Return the connected pieces of a mask HxW that hold any of the given pixels, as a mask."""
    pieces, _ = ndimage.label(mask)
    numbers = np.unique(pieces[rows, columns])
    return np.isin(pieces, numbers[numbers > 0])


def depth_inside(mask: np.ndarray) -> np.ndarray:
    """Return the distance HxW of each pixel of a mask to the nearest pixel outside, beyond the image too; else 0."""
    return ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]


def innermost_pixel(mask: np.ndarray) -> tuple[int, int]:
    """Return the row and column of a mask HxW's pixel farthest from the outside."""
    depth = depth_inside(mask)
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    return int(row), int(column)
