"""A training set of 2D slices, drawn from labelled 3D volumes."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import apply_transform
from tqdm import tqdm


class SliceDataset(Dataset):
    """The slices of volumes, each volume loaded and transformed once.

    Args:
        data: one dictionary a volume, such as the paths `image` and `label`.
        transform: loads and transforms a volume's dictionary; must leave `keys` as CxHxWxD arrays of whole numbers in
            0..255 and the same depth D.
        slice_transform: applied afresh whenever a slice is asked for; takes and returns a dictionary with `keys`
            as float32 CxHxW tensors.
        keys: the dictionary's items that become slices.
        progress: whether to show a progress bar while the volumes are loaded.
    """

    def __init__(
        self,
        data: Sequence[Mapping[Hashable, Any]],
        transform: Callable | None = None,
        slice_transform: Callable | None = None,
        *,
        keys: Sequence[str] = ("image", "label"),
        progress: bool = True,
    ) -> None:
        super().__init__(data=data, transform=transform)
        self.slice_transform = slice_transform
        self.keys = tuple(keys)
        self._slices: list[dict[str, np.ndarray]] = []
        for item in tqdm(data, desc="Loading volumes", disable=not progress):
            volume: Any = item if transform is None else apply_transform(transform, item)
            stacks = {key: np.asarray(volume[key]).astype(np.uint8) for key in self.keys}
            depth = next(iter(stacks.values())).shape[-1]
            self._slices += [
                {key: np.ascontiguousarray(stack[..., index]) for key, stack in stacks.items()}
                for index in range(depth)
            ]

    def __len__(self) -> int:
        return len(self._slices)

    def _transform(self, index: int) -> Any:
        item = {key: torch.from_numpy(array).float() for key, array in self._slices[index].items()}
        return item if self.slice_transform is None else apply_transform(self.slice_transform, item)
