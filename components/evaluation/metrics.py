"""Dice and average symmetric surface distance, per volume or picture and class, on the native grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric, compute_average_surface_distance

from components.base.volume_metadata import checked_spacing_mm, files_of, header_spacing_mm, is_picture
from components.data.acdc import CLASS_NAMES


def dice_per_class(y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Compute the Dice coefficient of every volume and foreground class.

    Args:
        y_pred: one-hot prediction `(B,C,spatial...)`, channel 0 the background.
        y: one-hot truth of the same shape.

    Returns:
        `(B,C-1)` float64 in 0..1, without background: 0 if only one of the two masks is empty, nan if both are.

    Raises:
        ValueError: if shapes differ, there are fewer than 2 channels, or values are not one-hot.
    """
    pred, truth = _foreground_masks(y_pred, y)
    intersection = (pred & truth).flatten(2).sum(-1).double()
    size = (pred.flatten(2).sum(-1) + truth.flatten(2).sum(-1)).double()
    return 2 * intersection / size  # 0 / 0 is nan: absent from both


def assd_per_class_mm(y_pred: torch.Tensor, y: torch.Tensor, spacing_mm: Sequence[float]) -> torch.Tensor:
    """Compute the average symmetric surface distance of every volume and foreground class.

    The mean is taken over the distances of both directions together. In a volume one slice deep, every voxel of a mask
    is surface, because the grid ends above and below it. A picture has no third axis; see `VolumeAssd`.

    Source: MONAI's `compute_average_surface_distance(symmetric=True)` for masks that both hold voxels.
    Differs: if only one mask is empty, the distance is the volume's diagonal, not inf. So a miss is penalised, and the
    mean over volumes stays finite.

    Args:
        y_pred: one-hot prediction `(B,C,spatial...)`, channel 0 the background.
        y: one-hot truth of the same shape.
        spacing_mm: voxel spacing in mm, one per spatial axis, in array order.

    Returns:
        `(B,C-1)` float64 in mm, without background; nan if both masks are empty.

    Raises:
        ValueError: as `dice_per_class`, or if `spacing_mm` is not one positive number per spatial axis.
    """
    pred, truth = _foreground_masks(y_pred, y)
    size = pred.shape[2:]
    spacing = checked_spacing_mm(spacing_mm, len(size))
    diagonal_mm = math.hypot(*(n * mm for n, mm in zip(size, spacing, strict=True)))
    in_pred, in_truth = _present(pred), _present(truth)
    scores = torch.full(in_pred.shape, torch.nan, dtype=torch.float64, device=pred.device)
    scores[in_pred ^ in_truth] = diagonal_mm
    for b, c in (in_pred & in_truth).nonzero().tolist():
        # always on the CPU: on CUDA MONAI uses another algorithm, and a score should not depend on the device
        one_pred, one_truth = (mask[b, c].cpu()[None, None] for mask in (pred, truth))
        distance_mm = compute_average_surface_distance(
            one_pred, one_truth, include_background=True, symmetric=True, spacing=spacing
        )
        scores[b, c] = distance_mm.item()
    return scores


def mean_over_volumes(scores: torch.Tensor) -> torch.Tensor:
    """Average over volumes, ignoring nan: `(N,K)` to `(K)`; nan for a class without defined scores."""
    return torch.nanmean(scores, dim=0)


def mean_over_classes(class_scores: torch.Tensor) -> torch.Tensor:
    """Average over classes, ignoring nan: `(K)` to a scalar; nan if no class is defined."""
    return torch.nanmean(class_scores)


class VolumeMetric(CumulativeIterationMetric):
    """Base of metrics that keep one score per volume and class, which masks held any voxel, and how many.

    Calls take one-hot `y_pred` and `y` as batch-first tensors `(B,C,spatial...)` or lists of channel-first ones, and
    return the scores `(B,C-1)`. The presence of masks is kept beside the scores because a score does not distinguish a
    miss from a false alarm.
    """

    def __call__(self, y_pred: Any, y: Any = None, **kwargs: Any) -> torch.Tensor:
        """Score a batch and remember it; see the class for shapes."""
        scores_and_flags: Any = super().__call__(y_pred, y, **kwargs)
        return scores_and_flags[0]

    def score(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Score a batch-first batch: `(B,C,spatial...)` twice to `(B,C-1)`."""
        raise NotImplementedError

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **_: Any) -> list[torch.Tensor]:
        if y is None:
            raise ValueError(f"{type(self).__name__} expected a truth y, received None: pass y_pred and y.")
        scores = self.score(y_pred, y)
        pred, truth = _foreground_masks(y_pred, y)
        annotated = torch.as_tensor(y).flatten(1).sum(-1, keepdim=True).double()  # voxels with a class, of all classes
        share = truth.flatten(2).sum(-1).double() / annotated.clamp(min=1)
        return [scores, _present(pred).to(torch.uint8), share]  # not every distributed backend gathers bool

    def _synced_buffers(self) -> list[torch.Tensor]:
        buffers = super().get_buffer()
        if buffers is None:
            raise ValueError(f"{type(self).__name__} has no scores yet: call it on at least one volume first.")
        return buffers

    def get_buffer(self) -> torch.Tensor:
        """Return the scores `(N,C-1)` of all volumes so far, over all ranks."""
        return self._synced_buffers()[0]

    def get_presence(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whether prediction and truth hold each class, two `(N,C-1)` bool tensors aligned with `get_buffer`."""
        _, in_pred, share = self._synced_buffers()
        return in_pred.bool(), share > 0

    def get_share(self) -> torch.Tensor:
        """Return the fraction of each volume that is truly of each class, `(N,C-1)` aligned with `get_buffer`."""
        return self._synced_buffers()[2]

    def aggregate(self) -> torch.Tensor:
        """Return the mean over volumes, then over classes, ignoring nan, as a scalar tensor."""
        return mean_over_classes(mean_over_volumes(self.get_buffer()))


class VolumeDice(VolumeMetric):
    """Dice per volume and class, see `dice_per_class`."""

    def score(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Score a batch-first batch: `(B,C,spatial...)` twice to `(B,C-1)`."""
        return dice_per_class(y_pred, y)


class VolumeAssd(VolumeMetric):
    """Average symmetric surface distance per volume and class, see `assd_per_class_mm`, by each volume's own spacing.

    The spacing is read from the affine of `y`. A picture is measured in 2D, in pixels: it is one slice deep, and all of
    its pixels would be surface in 3D. A `y` whose file is a picture is one.

    Raises:
        ValueError: if called on a `y` without a header's affine.
    """

    def score(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Score a batch-first batch: `(B,C,spatial...)` twice to `(B,C-1)` in mm, or in pixels for pictures."""
        _foreground_masks(y_pred, y)  # report a wrong shape rather than the missing spacing that it leads to
        return torch.cat([self._score_one(y_pred[i : i + 1], y[i : i + 1], y[i]) for i in range(len(y))])

    @staticmethod
    def _score_one(y_pred: torch.Tensor, y: torch.Tensor, volume: torch.Tensor) -> torch.Tensor:
        """Score a batch of one, whose truth is the MetaTensor `volume`."""
        if not any(map(is_picture, files_of(volume))):
            return assd_per_class_mm(y_pred, y, header_spacing_mm(volume))
        flat_pred, flat_truth = (torch.as_tensor(masks).as_subclass(torch.Tensor)[..., 0] for masks in (y_pred, y))
        return assd_per_class_mm(flat_pred, flat_truth, (1.0, 1.0))


class VolumeMetricHandler(IgniteMetricHandler):
    """Base handler: attaches a `VolumeMetric` under `<name>` and its classes' means under `<name>_<class>`.

    With `save_details`, `engine.state.metric_details` receives the scores under `<name>`. It receives the presence of
    masks under `<name>_in_pred` and `<name>_in_truth`, and the share of true voxels under `<name>_share`. All are
    `(N,C-1)`.

    Args:
        output_transform: extracts `(y_pred, y)` from `engine.state.output`, one-hot, see `VolumeMetric`.
        save_details: whether to keep the scores of every volume in `engine.state.metric_details`.
        class_names: names of the foreground classes, in channel order.
    """

    metric_class: type[VolumeMetric]
    metric_fn: VolumeMetric

    def __init__(
        self,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
        class_names: Sequence[str] = CLASS_NAMES,
    ) -> None:
        super().__init__(metric_fn=self.metric_class(), output_transform=output_transform, save_details=save_details)
        self.class_names = tuple(class_names)

    def completed(self, engine: Engine, name: str) -> None:
        """Write the epoch's results into `engine.state`.

        Raises:
            ValueError: if there are not as many class names as foreground channels.
        """
        super().completed(engine, name)
        class_means = mean_over_volumes(self.metric_fn.get_buffer()).tolist()
        if len(class_means) != len(self.class_names):
            raise ValueError(
                f"Expected one class name per foreground channel, received {self.class_names} for {len(class_means)} "
                "channels: set class_names."
            )
        for class_name, value in zip(self.class_names, class_means, strict=True):
            engine.state.metrics[f"{name}_{class_name}"] = value
        if self.save_details:
            in_pred, in_truth = self.metric_fn.get_presence()
            details: dict[str, torch.Tensor] = engine.state.metric_details  # type: ignore[attr-defined]
            share = self.metric_fn.get_share()
            details.update({f"{name}_in_pred": in_pred, f"{name}_in_truth": in_truth, f"{name}_share": share})


class VolumeDiceHandler(VolumeMetricHandler):
    """Ignite handler of `VolumeDice`; arguments as in `VolumeMetricHandler`."""

    metric_class = VolumeDice


class VolumeAssdHandler(VolumeMetricHandler):
    """Ignite handler of `VolumeAssd`; arguments as in `VolumeMetricHandler`."""

    metric_class = VolumeAssd


def _foreground_masks(y_pred: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Check two one-hot tensors `(B,C,spatial...)`; return bool masks `(B,C-1,spatial...)` on `y_pred`'s device."""
    if y_pred.shape != y.shape:
        raise ValueError(
            f"Expected y_pred and y of one shape, received {tuple(y_pred.shape)} and {tuple(y.shape)}: "
            "invert the prediction to the truth's grid and make both one-hot."
        )
    if y.ndim < 3 or y.shape[1] < 2:
        raise ValueError(
            "Expected (B,C,spatial...) with background and at least one class, received "
            f"{tuple(y.shape)}: make label maps one-hot with AsDiscreted(to_onehot=C)."
        )
    masks = []
    for name, tensor in (("y_pred", y_pred), ("y", y)):
        plain = tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
        mask = plain.to(y_pred.device) == 1
        if not (torch.equal(mask.to(plain.dtype), plain.to(mask.device)) and bool((mask.sum(1) == 1).all())):
            raise ValueError(
                f"Expected {name} one-hot over its channels (0 or 1, a single 1 per voxel), received other values "
                f"from {plain.min().item():g} to {plain.max().item():g}: "
                "apply AsDiscreted(argmax=True, to_onehot=C) to logits, AsDiscreted(to_onehot=C) to label maps."
            )
        masks.append(mask[:, 1:])
    return masks[0], masks[1]


def _present(masks: torch.Tensor) -> torch.Tensor:
    """Return whether each mask of `(B,K,spatial...)` holds any voxel, `(B,K)`."""
    return masks.flatten(2).any(-1)
