"""A training set of 2D slices, drawn from labelled 3D volumes."""

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import Randomizable, apply_transform
from tqdm import tqdm


class SliceDataset(Dataset):
    """The slices of volumes, each volume loaded and transformed once.

    With `views` = K, a slice is augmented in K ways only and shows another of them every epoch, the same ones in every
    run: what draws them is the slice's content and the view's number. So a frozen encoder's embeddings of them can be
    looked up from the (K+1)th epoch on. Views are kept in memory once made. With `views` = 0 every epoch shows a new
    one, drawn from the slice's content and the epoch's number, so that a resumed run sees what an unbroken one does.

    Args:
        data: one dictionary a volume, such as the paths `image` and `label`.
        transform: loads and transforms a volume's dictionary; must leave `keys` as CxHxWxD arrays of whole numbers in
            0..255 and the same depth D.
        slice_transform: the augmentation; takes and returns a dictionary with `keys` as float32 CxHxW tensors, and
            with `views` leaves whole numbers in 0..255.
        views: number of augmented views of each slice, or 0 to augment it afresh in every epoch.
        final_transform: applied to every slice or view last, whenever it is asked for.
        keys: the dictionary's items that become slices.
        progress: whether to show a progress bar while the volumes are loaded.

    Raises:
        ValueError: when `views` is no whole number from 0 on.
    """

    def __init__(
        self,
        data: Sequence[Mapping[Hashable, Any]],
        transform: Callable | None = None,
        slice_transform: Callable | None = None,
        *,
        views: int = 0,
        final_transform: Callable | None = None,
        keys: Sequence[str] = ("image", "label"),
        progress: bool = True,
    ) -> None:
        super().__init__(data=data, transform=transform)
        if not isinstance(views, int) or views < 0:
            raise ValueError(
                f"views must be a whole number, 0 for fresh augmentation, received {views!r}: "
                "give for example --views 16"
            )
        self.slice_transform = slice_transform
        self.views = views
        self.final_transform = final_transform
        self.keys = tuple(keys)
        self._epoch = 1
        self._views: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self._slices: list[dict[str, np.ndarray]] = []
        for item in tqdm(data, desc="Loading volumes", disable=not progress):
            volume: Any = item if transform is None else apply_transform(transform, item)
            stacks = {key: _in_whole_values(volume[key]) for key in self.keys}
            depth = next(iter(stacks.values())).shape[-1]
            self._slices += [
                {key: np.ascontiguousarray(stack[..., index]) for key, stack in stacks.items()}
                for index in range(depth)
            ]

    def __len__(self) -> int:
        return len(self._slices)

    def set_epoch(self, epoch: int) -> None:
        """Turn to an epoch's views.

        Args:
            epoch: its number, from 1 on.
        """
        self._epoch = epoch

    def _transform(self, index: int) -> Any:
        if self.views:
            item = _as_tensors(self._view(index, (self._epoch - 1) % self.views))
        else:
            item = self._augmented(index, self._epoch - 1)
        return _applied(self.final_transform, item)

    def _view(self, index: int, view: int) -> dict[str, np.ndarray]:
        """Return an augmented view of a slice, made when first asked for."""
        if (index, view) not in self._views:
            item = self._augmented(index, view)
            self._views[index, view] = {key: _in_whole_values(item[key]) for key in self.keys}
        return self._views[index, view]

    def _augmented(self, index: int, view: int) -> Any:
        if isinstance(self.slice_transform, Randomizable):
            self.slice_transform.set_random_state(seed=_seed(self._slices[index], view))
        return _applied(self.slice_transform, _as_tensors(self._slices[index]))


def _in_whole_values(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.uint8)


def _as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(array).float() for key, array in arrays.items()}


def _applied(transform: Callable | None, item: Any) -> Any:
    return item if transform is None else apply_transform(transform, item)


def _seed(arrays: Mapping[str, np.ndarray], view: int) -> int:
    """Draw a seed from a slice's content and a view's number, alike in every run and whatever else is trained on."""
    digest = hashlib.sha256(str(view).encode())
    for key in sorted(arrays):
        digest.update(arrays[key].tobytes())
    return int.from_bytes(digest.digest()[:4], "little")
