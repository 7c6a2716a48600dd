"""A training set of 2D slices of labelled 3D volumes."""

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import Dataset
from monai.transforms import Randomizable, apply_transform
from tqdm import tqdm

from components.data.planes import check_planes, in_plane, with_neighbours

UNLABELLED = 255  # label of every pixel of a slice without a label: no class, so that no loss takes it for background
IGNORED = 254  # label of a pixel that nobody has annotated, in a slice with a label: no class either
_OUTNUMBERED_BY = 2  # unlabelled slices for each labelled one, at most


class SliceDataset(Dataset):
    """The slices of volumes; each volume is loaded and transformed once.

    With `views` = K, each slice has K augmented views, which take turns from epoch to epoch and are kept in memory. The
    embeddings of a frozen encoder are then cache hits from epoch K+1 on. With `views` = 0, every epoch has a new view.
    The seed of a view is a hash of the slice and of the number of the view or epoch. Views are the same in every run,
    also in a resumed one. A slice whose label is IGNORED in all pixels is left out.

    Args:
        data: one dictionary per volume, such as the paths `image` and `label`.
        transform: loads and transforms a volume's dictionary. Its result must have `keys` as CxHxWxD arrays of integers
            in 0..255, all with the same depth D.
        slice_transform: the augmentation of a dictionary with `keys` as float32 CxHxW tensors. With `views` it must
            return integers in 0..255.
        views: number of augmented views per slice; 0 for a new augmentation in every epoch.
        final_transform: applied last, to each slice or view, at every access.
        at_least: minimum number of items in an epoch. Fewer slices are repeated, each time as the next view.
        background_share: the largest share of labelled items that show no class. Slices that show one are repeated
            until it holds, each time as the next view.
        keys: items of the dictionary that are sliced.
        planes: 1 for slices in the volume's own plane, 3 for those in the two perpendicular planes as well. These are
            padded with 0 to the size of the others, evenly on both sides.
        neighbours: whether each slice of the image gets the ones before and after it as channels.
        unlabelled: dictionaries of volumes without a `label`, which is UNLABELLED in all pixels of their slices. The
            augmentation pads it with 0. Slices of `data` are repeated until unlabelled ones are at most twice as many.
        progress: whether to show a progress bar while the volumes are loaded.

    Raises:
        ValueError: when `views` is no integer or negative, `planes` not 1 or 3, or `background_share` not above 0 and
            at most 1. When there is no volume. When one of `data` lacks an item of `keys`, such as its label.
    """

    def __init__(
        self,
        data: Sequence[Mapping[Hashable, Any]],
        transform: Callable | None = None,
        slice_transform: Callable | None = None,
        *,
        views: int = 0,
        final_transform: Callable | None = None,
        at_least: int = 0,
        background_share: float = 1.0,
        keys: Sequence[str] = ("image", "label"),
        planes: int = 1,
        neighbours: bool = False,
        unlabelled: Sequence[Mapping[Hashable, Any]] = (),
        progress: bool = True,
    ) -> None:
        super().__init__(data=data, transform=transform)
        if not isinstance(views, int) or views < 0:
            raise ValueError(
                f"views must be a whole number, 0 for fresh augmentation, received {views!r}: "
                "give for example --views 16"
            )
        check_planes(planes)
        if not 0 < background_share <= 1:
            raise ValueError(f"background_share must be above 0 and at most 1, received {background_share!r}")
        if not data and not unlabelled:
            raise ValueError(
                "expected at least one volume to train on, received none: give for example --labelled_cases 1"
            )
        self.slice_transform = slice_transform
        self.views = views
        self.final_transform = final_transform
        self.keys = tuple(keys)
        self._epoch = 1
        self._views: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self.planes = planes
        self.neighbours = neighbours
        self._slices: list[dict[str, np.ndarray]] = []
        for item in tqdm(data, desc="Loading volumes", disable=None if progress else True):
            volume = _apply(transform, item)
            if missing := [key for key in self.keys if key not in volume]:
                raise ValueError(
                    f"{item.get('image', 'a volume')} has no {' and no '.join(missing)}: expected a labelled volume, "
                    "or one without a label among the `unlabelled`"
                )
            self._slices += [each for each in self._cut(volume) if np.any(each.get("label", 0) != IGNORED)]
        shows_class = [bool(np.isin(each.get("label", 0), [0, IGNORED], invert=True).any()) for each in self._slices]
        labelled, showing = len(shows_class), sum(shows_class)
        for item in tqdm(unlabelled, desc="Loading unlabelled", disable=None if progress and unlabelled else True):
            volume = _apply(transform, item)
            self._slices += self._cut({**volume, "label": np.full_like(_as_uint8(volume["image"][:1]), UNLABELLED)})
        # An epoch shows each slice `repeats` times, labelled ones more often where unlabelled ones outnumber them, and
        # those of them that show a class still more often where they are too few.
        without_label = len(self._slices) - labelled
        repeats = max(1, math.ceil(at_least / max(1, len(self._slices))))
        more_often = repeats * max(1, without_label // (_OUTNUMBERED_BY * max(1, labelled)))
        wanted = (1 / background_share - 1) * (labelled - showing)
        most_often = more_often * max(1, math.ceil(wanted / showing) if showing else 1)
        self._times = [most_often if each else more_often for each in shows_class] + [repeats] * without_label
        self._items = [(index, turn) for turn in range(most_often) for index, n in enumerate(self._times) if turn < n]

    def __len__(self) -> int:
        return len(self._items)

    def set_epoch(self, epoch: int) -> None:
        """Select the views of an epoch.

        Args:
            epoch: number of the epoch, from 1 on.
        """
        self._epoch = epoch

    def _cut(self, volume: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
        """Return the slices of a volume."""
        stacks = {key: torch.from_numpy(_as_uint8(volume[key])) for key in self.keys}
        side = next(iter(stacks.values())).shape[1:3]
        slices = []
        for plane in range(self.planes):
            turned = {key: in_plane(stack, plane) for key, stack in stacks.items()}
            if self.neighbours:
                turned["image"] = with_neighbours(turned["image"])
            for index in range(next(iter(turned.values())).shape[-1]):
                slices.append({key: _padded(stack[..., index], side) for key, stack in turned.items()})
        return slices

    def _transform(self, index: int) -> Any:
        index, turn = self._items[index]
        view = (self._epoch - 1) * self._times[index] + turn
        item = _as_tensors(self._view(index, view % self.views)) if self.views else self._augment(index, view)
        return _apply(self.final_transform, item)

    def _view(self, index: int, view: int) -> dict[str, np.ndarray]:
        """Return a view of a slice, augmenting the slice at the first access only."""
        if (index, view) not in self._views:
            item = self._augment(index, view)
            self._views[index, view] = {key: _as_uint8(item[key]) for key in self.keys}
        return self._views[index, view]

    def _augment(self, index: int, view: int) -> Any:
        if isinstance(self.slice_transform, Randomizable):
            self.slice_transform.set_random_state(seed=_seed(self._slices[index], view))
        return _apply(self.slice_transform, _as_tensors(self._slices[index]))


def _padded(image: torch.Tensor, side: Sequence[int]) -> np.ndarray:
    """Return a contiguous array of an image CxHxW, padded with 0 to at least the size `side`."""
    missing = [max(0, wanted - size) for wanted, size in zip(side, image.shape[1:], strict=True)]
    width = [part for each in reversed(missing) for part in (each // 2, each - each // 2)]
    return np.ascontiguousarray(F.pad(image, width).numpy())


def _as_uint8(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.uint8)


def _as_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(array).float() for key, array in arrays.items()}


def _apply(transform: Callable | None, item: Any) -> Any:
    return item if transform is None else apply_transform(transform, item)


def _seed(arrays: Mapping[str, np.ndarray], view: int) -> int:
    """Return the seed of a view: a hash of the slice's content and the view's number."""
    digest = hashlib.sha256(str(view).encode())
    for key in sorted(arrays):
        digest.update(arrays[key].tobytes())
    return int.from_bytes(digest.digest()[:4], "little")
