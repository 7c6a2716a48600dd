"""Correction of one volume's segmentation by clicks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose, Transform
from monai.utils import MetaKeys
from torch import nn

from components.base.masks import pieces_at
from components.base.precision import autocast_to
from components.data.clicks import Voxel, clicks_by_slice, read_clicks

logger = logging.getLogger(__name__)

EMBEDDINGS = "embeddings"  # item with those of the slices that have clicks, by slice
_SMALLEST = 1e-6  # probability of which a logarithm is taken

OfSlice = Mapping[int, Sequence[tuple[Voxel, bool]]]  # as `clicks_by_slice` returns it


class CorrectByClicksd(Transform):
    """Make the label map of a volume or picture, and correct it where there are clicks.

    Voxels are mapped to the network's canvas by the affines of label map and image, which MONAI's transforms keep. A
    slice without a click stays as it is without this transform. In a slice with clicks, so do all pixels but those
    that a corrected class gains or loses. A piece of it that is new and apart from the class so far needs a click.

    Args:
        clicks: as `source` of `components.data.clicks.read_clicks`.
        class_names: the classes without the background, in the order of their labels.
        encoder: from slices Bx3xSxS to their embeddings.
        corrector: from embeddings, logits and clicks to logits, as `components.networks.ClickCorrectedSam`.
        is_probability: whether the network's output is probabilities, else it is logits.
        on_native_grid: transforms from the network's output on the canvas to labels on the image's own grid.
        cleaning: further transforms of these labels, before the correction.
        precision: as for `components.networks.PromptFreeSam`, for the encoder.
        key: item CxSxSxD with the network's output, slices last.
        image_key: item 3xSxSxD with the image on the canvas.
    """

    def __init__(
        self,
        clicks: str | Mapping[str, Any],
        class_names: Sequence[str],
        encoder: nn.Module,
        corrector: nn.Module,
        *,
        is_probability: bool,
        on_native_grid: Sequence[Callable],
        cleaning: Sequence[Callable],
        precision: str = "auto",
        key: str = "pred",
        image_key: str = "image",
    ) -> None:
        self.clicks = clicks
        self.class_names = class_names
        self.encoder = encoder
        self.corrector = corrector
        self.is_probability = is_probability
        self.on_native_grid = Compose(on_native_grid)
        self.cleaning = Compose(cleaning)
        self.precision = precision
        self.key = key
        self.image_key = image_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Make and correct the label map of one dictionary.

        Args:
            data: MetaTensors by key. Embeddings in the item `EMBEDDINGS` are used; those of other slices are added.

        Returns:
            the dictionary with the label map 1xHxWxD in place of the network's output.

        Raises:
            ValueError: if a click does not fit the image.
            FileNotFoundError: if there is no file of clicks.
        """
        plain = self.cleaning(self.on_native_grid(dict(data)))
        labels = plain[self.key]
        to_canvas = torch.linalg.inv(data[self.image_key].affine.double()) @ labels.affine.double()
        axis = int(to_canvas[2, :3].abs().argmax())
        clicks = read_clicks(self.clicks, self.class_names, labels.shape[1:])
        by_slice = clicks_by_slice(clicks, labels[0].cpu().numpy(), axis)
        logger.info("%d clicks correct %d slices", len(clicks), len(by_slice))
        if not by_slice:
            return plain
        scores = data[self.key].as_tensor()
        logits = scores.clamp_min(_SMALLEST).log() if self.is_probability else scores.clone()
        for of_slice in by_slice.values():
            self._correct(logits, data, of_slice, to_canvas.cpu().numpy())
        corrected = logits.softmax(dim=0) if self.is_probability else logits  # as the plain labels are made of
        output = MetaTensor(corrected).copy_meta_from(data[self.key])
        redrawn = self.on_native_grid({**data, self.key: output})[self.key]
        for number, of_slice in by_slice.items():
            before, after = (each[0].as_tensor().select(axis, number) for each in (labels, redrawn))
            merged = merge_slice(before.cpu().numpy(), after.cpu().numpy(), _within(of_slice, axis))
            before.copy_(torch.from_numpy(merged))
        return plain

    def _correct(
        self, logits: torch.Tensor, data: Mapping[Hashable, Any], of_slice: OfSlice, to_canvas: np.ndarray
    ) -> None:
        """Correct a slice of logits CxSxSxD in place."""
        points, depth = {}, 0
        for label, clicks in of_slice.items():
            seen = []
            for voxel, sign in clicks:
                y, x, z = (to_canvas @ [*voxel, 1])[:3]
                depth = round(z)
                if 0 <= round(y) < logits.shape[1] and 0 <= round(x) < logits.shape[2]:
                    seen.append((x, y, sign))
                else:
                    logger.warning("the click %s lies outside of what the network sees: it is left out", list(voxel))
            if seen:
                given = torch.tensor(seen, device=logits.device)
                points[label] = given[:, :2], given[:, 2]
        if not points:
            return
        embeddings = data.get(EMBEDDINGS, {})
        if depth not in embeddings:
            image = data[self.image_key].as_tensor()[None, ..., depth].to(logits.device)
            with torch.no_grad(), autocast_to(self.precision, logits.device.type):
                embeddings[depth] = self.encoder(image).float()
        logits[..., depth] = self.corrector(embeddings[depth], logits[None, ..., depth], [points])[0]


def merge_slice(before: np.ndarray, redrawn: np.ndarray, clicks: OfSlice) -> np.ndarray:
    """Bring what clicks have corrected into a slice of a label map.

    Args:
        before: the labels so far HxW.
        redrawn: the labels HxW with the corrected classes.
        clicks: of each corrected class the pixels, and whether they belong to it.

    Returns:
        the labels HxW: those so far, with the new shape of each corrected class. A piece of it is left out unless it
        overlaps the class so far or has a click on it.
    """
    after = before.copy()
    is_lost = np.isin(before, list(clicks)) & (redrawn != before)
    after[is_lost] = np.where(np.isin(redrawn, list(clicks)), 0, redrawn)[is_lost]
    for label, pixels in clicks.items():
        known = before == label
        for pixel, is_on in pixels:
            known[pixel] |= is_on
        after[pieces_at(redrawn == label, *np.nonzero(known))] = label
    return after


def check_clicks(
    clicks: str | Mapping[str, Any], class_names: Sequence[str], dataset: Dataset, dataset_dir: str
) -> None:
    """Check that clicks fit the image to segment, before this takes its time.

    Args:
        clicks: as for `CorrectByClicksd`.
        class_names: likewise.
        dataset: of one image, prepared for the network.
        dataset_dir: where it was found, for messages.

    Raises:
        ValueError: if a click does not fit, or as for `only_item`.
        FileNotFoundError: if there is no file of clicks.
    """
    read_clicks(clicks, class_names, original_shape(only_item(dataset, dataset_dir)["image"]))


def only_item(dataset: Dataset, dataset_dir: str) -> dict[str, Any]:
    """Return the prepared image in which clicks lie.

    Args:
        dataset: as for `check_clicks`.
        dataset_dir: likewise.

    Raises:
        ValueError: if there are several images or the frames of a cine.
    """
    if len(dataset) != 1:
        raise ValueError(
            f"{dataset_dir} holds {len(dataset)} images or frames: expected one, in which the clicks lie; give one "
            "image's file, and save a frame of a cine as a volume"
        )
    item: Any = dataset[0]
    return item


def original_shape(image: MetaTensor) -> list[int]:
    """Return the shape HxWxD that an image had in its file, where clicks lie."""
    return [int(size) for size in image.meta[MetaKeys.SPATIAL_SHAPE]]


def _within(of_slice: OfSlice, axis: int) -> OfSlice:
    """Return the clicks of a slice as its pixels, without the axis across slices."""
    return {
        label: [(voxel[:axis] + voxel[axis + 1 :], is_on) for voxel, is_on in clicks]
        for label, clicks in of_slice.items()
    }
