"""Practice of corrections: a network errs on drawn pictures, and another one learns to mend the errors by clicks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from monai.engines import IterationEvents, SupervisedEvaluator, SupervisedTrainer
from monai.utils.enums import CommonKeys

from components.base.masks import depth_inside, largest_piece, pieces_at
from components.base.precision import autocast_to
from components.networks.click_head import ClickHead, click_marks
from components.networks.corrector import against_rest
from components.networks.prompt_free_sam import PromptFreeSam

_SMALLEST_LOGIT = -8.0  # of a class's probability
# How the answer to correct is made worse. Each damage takes part with its chance, by a random share of its amount.
_DAMAGED_EMBEDDINGS = 0.35
_DROPPED_CHANNELS = 0.5  # share of the embeddings' channels that are cleared
_CHANNEL_SHIFT, _EMBEDDING_NOISE = 0.8, 0.5  # relative to the deviation of the embeddings
_OTHER_PLACE = 0.2  # chance of the answer that belongs to a picture of another size and place
_ZOOM, _SHIFT = 0.2, 0.1  # shift relative to half of the slice
_BLOB = 0.3  # chance of a piece of any class, also of background, near an object
_BLOB_PX = (6.0, 24.0)
_SWAPPED = 0.1  # chance that two of more than two classes are taken for each other
_WAVES = 2.5  # amplitude of smooth noise in the logits
_WAVE_CELLS = (4, 16)
_SEEN_DAMAGED = 0.5  # chance that the click head gets the damaged embeddings, too
# The truth is changed with a chance, since on real images the embeddings themselves mislead, and only clicks tell.
_OTHER_TRUTH = 0.6
_GROWTH_PX = 4
_WARP_PX, _WARP_CELLS = 8.0, 5
# How a person clicks.
_BESIDE = 0.05  # chance of a click some pixels beside its place
_BESIDE_PX = 6
_DEPTH = 0.4  # a click lies where the depth in the error is at least 1 - this share of the largest
_RARE_CLASS = 20.0  # pixels that each class counts as wrong at least when one is chosen


class ClickPractice:
    """Steps of a MONAI engine (`iteration_update`) in which a `ClickHead` learns from simulated clicks, or is scored.

    In each slice one class is corrected, and each of a random number of clicks lies inside the largest error that the
    earlier ones left. The network is to mend the connected errors that have a click, and nothing else. Source: Sofiiuk
    et al., "Reviving Iterative Training with Mask Guidance for Interactive Segmentation", ICIP 2022. Differs: the
    answer before any click stays the network's input.

    Args:
        segmenter: encoder and head whose answers are corrected; both stay as they are.
        loss: from logits Bx1xHxW and targets Bx1xHxW.
        clicks: the largest number of clicks in a slice.
        seed: of damages and clicks; a step depends on it and the step's number only.
    """

    def __init__(
        self,
        segmenter: PromptFreeSam,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        clicks: int = 4,
        seed: int = 0,
    ) -> None:
        self.segmenter = segmenter.requires_grad_(False).eval()
        self.loss = loss
        self.clicks = clicks
        self.seed = seed

    def training_step(self, engine: SupervisedTrainer, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Train on slices `image` Bx3xHxW with `label` Bx1xHxW; return the output, one item per slice."""
        engine.optimizer.zero_grad()
        output = self._practise(engine, batch[CommonKeys.IMAGE], batch[CommonKeys.LABEL], engine.state.iteration)
        output[CommonKeys.LOSS].backward()
        engine.state.output = output
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        engine.optimizer.step()
        engine.fire_event(IterationEvents.MODEL_COMPLETED)  # after it, the output is one item per slice
        return engine.state.output

    def validation_step(self, engine: SupervisedEvaluator, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Score a stack `image` with `label` 1x1xHxWxD; return masks `before`, `pred`, `label` 1xHxW of each slice."""
        images, labels = (batch[key][0].permute(3, 0, 1, 2) for key in (CommonKeys.IMAGE, CommonKeys.LABEL))
        with torch.no_grad():
            output = self._practise(engine, images.expand(-1, 3, -1, -1), labels.float(), -engine.state.iteration)
        output = {key: output[key] > 0 for key in ("before", CommonKeys.PRED, CommonKeys.LABEL)}
        engine.state.output = output
        engine.fire_event(IterationEvents.MODEL_COMPLETED)  # after it, the output is one item per slice
        return engine.state.output

    def _practise(self, engine: Any, images: torch.Tensor, labels: torch.Tensor, step: int) -> dict[str, Any]:
        """Return `before`, `pred` (logits) and `label`, what clicks ask for, of one class Bx1xHxW, and the `loss`."""
        random = np.random.default_rng((self.seed, abs(step), step < 0))
        network = cast(ClickHead, engine.network)
        images, labels = images.to(engine.state.device), labels.to(engine.state.device)
        labels = torch.stack([_other_truth(each, random) for each in labels])
        with torch.no_grad():
            embeddings, logits = self._answer(images, labels, random)
        numbers = [_class_to_correct(*pair, random) for pair in zip(logits.argmax(1), labels[:, 0], strict=True)]
        targets = torch.stack([labels[i] == number for i, number in enumerate(numbers)])
        before = torch.stack([against_rest(*pair) for pair in zip(logits, numbers, strict=True)])[:, None]
        pred, wanted = before, before > 0
        clicks: list[list[tuple[int, int, int]]] = [[] for _ in numbers]
        rounds = int(random.integers(1, self.clicks + 1))
        for round_ in range(rounds):
            for i, of_slice in enumerate(clicks):
                of_slice.append(_click(pred[i, 0] > 0, targets[i, 0], random))
                wanted[i, 0] ^= _error_at(
                    of_slice[-1], (before[i, 0] > 0) != targets[i, 0], wanted[i, 0] == targets[i, 0]
                )
            marks = torch.stack([_marks(of_slice, images) for of_slice in clicks])
            network.train(step > 0 and round_ == rounds - 1)
            with (
                torch.set_grad_enabled(network.training),
                autocast_to(self.segmenter.precision, images.device.type),
            ):
                pred = network.masks(embeddings, logits, numbers, marks)[:, None]
        return {
            CommonKeys.IMAGE: images,
            CommonKeys.LABEL: wanted.float(),
            CommonKeys.PRED: pred,
            "before": before,
            CommonKeys.LOSS: self.loss(pred, wanted.float()),
        }

    def _answer(
        self, images: torch.Tensor, labels: torch.Tensor, random: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embeddings of slices, and logits BxCxHxW that have errors like those in unknown images."""
        generator = torch.Generator(images.device).manual_seed(int(random.integers(2**62)))
        with autocast_to(self.segmenter.precision, images.device.type):
            embeddings = self.segmenter.encoder(images).float()
            damaged = torch.stack([_damaged(each, random, generator) for each in embeddings])
            logits = self.segmenter.head(damaged)
        is_damaged = torch.as_tensor(random.random(len(images)) < _SEEN_DAMAGED, device=images.device)
        embeddings = torch.where(is_damaged[:, None, None, None], damaged, embeddings)
        logits = logits.float().log_softmax(1).clamp_min(_SMALLEST_LOGIT)
        for answer, label in zip(logits, labels[:, 0], strict=True):
            if random.random() < _OTHER_PLACE:
                answer.copy_(_elsewhere(answer, random))
            if random.random() < _BLOB:
                _add_blob(answer, label, random)
            if random.random() < _SWAPPED and len(answer) > 2:
                one, other = random.permutation(len(answer))[:2].tolist()
                answer[[one, other]] = answer[[other, one]]
            cells = int(random.integers(*_WAVE_CELLS))
            waves = torch.randn(1, len(answer), cells, cells, generator=generator, device=answer.device)
            smooth = F.interpolate(waves, size=answer.shape[1:], mode="bicubic")
            answer += smooth[0] * _WAVES * random.random()
        return embeddings, logits.log_softmax(1).clamp_min(_SMALLEST_LOGIT)


def _other_truth(label: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Return a label map 1xHxW of another expert: a class is absent, cut, wider or narrower, or all are warped."""
    classes = label.unique()[1:].tolist()
    if not classes or random.random() >= _OTHER_TRUTH:
        return label
    number, kind = classes[int(random.integers(len(classes)))], int(random.integers(4))
    mask = label == number
    if kind == 0:
        return label.where(~mask, 0)
    if kind == 1:  # on a random side of one of its pixels
        _, y, x = torch.nonzero(mask)[int(random.integers(int(mask.sum())))].tolist()
        angle = random.uniform(0, 2 * np.pi)
        rows, columns = (torch.arange(size, device=label.device) for size in label.shape[1:])
        side = (rows[:, None] - y) * np.sin(angle) + (columns - x) * np.cos(angle) > 0
        return label.where(~(mask & side), 0)
    if kind == 2:
        reach = int(random.integers(1, _GROWTH_PX + 1))
        grows = random.random() < 0.5
        widened = F.max_pool2d((mask == grows).float(), 2 * reach + 1, stride=1, padding=reach) > 0
        return torch.where(widened & (label == 0), number, label) if grows else label.where(~(mask & widened), 0)
    waves = torch.as_tensor(random.normal(size=(1, 2, _WARP_CELLS, _WARP_CELLS)), device=label.device).float()
    size = list(label.shape[1:])
    shift = F.interpolate(waves, size=size, mode="bicubic").permute(0, 2, 3, 1) * random.random() * _WARP_PX / size[0]
    grid = F.affine_grid(torch.eye(2, 3, device=label.device)[None], [1, 1, *size], align_corners=False) + shift
    return F.grid_sample(label[None], grid, mode="nearest", align_corners=False)[0]


def _damaged(embedding: torch.Tensor, random: np.random.Generator, generator: torch.Generator) -> torch.Tensor:
    """Clear some channels of an embedding CxHxW, shift them and add noise."""
    if random.random() >= _DAMAGED_EMBEDDINGS:
        return embedding

    def drawn(like: torch.Tensor, make: Callable[..., torch.Tensor]) -> torch.Tensor:
        return make(like.shape, generator=generator, device=like.device)

    one = embedding[:, :1, :1]
    amounts = random.random(3) * embedding.new_tensor([_DROPPED_CHANNELS, _CHANNEL_SHIFT, _EMBEDDING_NOISE]).tolist()
    kept = drawn(one, torch.rand) >= amounts[0]
    shift = drawn(one, torch.randn) * amounts[1] + drawn(embedding, torch.randn) * amounts[2]
    return embedding * kept + shift * embedding.std()


def _elsewhere(logits: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Return logits CxHxW enlarged and shifted by random amounts."""
    zoom, *shift = random.uniform([1 - _ZOOM, -_SHIFT, -_SHIFT], [1 + _ZOOM, _SHIFT, _SHIFT]).tolist()
    matrix = logits.new_tensor([[[zoom, 0, shift[0]], [0, zoom, shift[1]]]])
    grid = F.affine_grid(matrix, [1, *logits.shape], align_corners=False)
    return F.grid_sample(logits[None], grid, padding_mode="border", align_corners=False)[0]


def _add_blob(logits: torch.Tensor, label: torch.Tensor, random: np.random.Generator) -> None:
    """Add an ellipse of a random class, also of background, to logits CxHxW near the labelled pixels."""
    near = torch.nonzero(F.max_pool2d((label > 0).float()[None], 25, stride=1, padding=12)[0])
    if not len(near):
        return
    y, x = near[int(random.integers(len(near)))].tolist()
    radius, aspect = random.uniform(*_BLOB_PX), random.uniform(0.6, 1.4)
    rows, columns = (torch.arange(size, device=logits.device) for size in label.shape)
    distance = ((rows - y) / aspect).square()[:, None] + ((columns - x) * aspect).square()
    logits[int(random.integers(len(logits)))] += (distance < radius**2) * float(random.uniform(4, 12))


def _class_to_correct(answer: torch.Tensor, label: torch.Tensor, random: np.random.Generator) -> int:
    """Choose a class of label maps HxW by the number of its wrong pixels."""
    classes = range(1, int(max(answer.max(), label.max())) + 1) or range(1, 2)
    wrong = np.array([float(((answer == each) != (label == each)).sum()) + _RARE_CLASS for each in classes])
    return 1 + int(random.choice(len(wrong), p=wrong / wrong.sum()))


def _click(mask: torch.Tensor, target: torch.Tensor, random: np.random.Generator) -> tuple[int, int, int]:
    """Return column, row and sign of a click inside the largest error of a mask HxW."""
    truth, wrong = target.cpu().numpy(), (mask != target).cpu().numpy()
    if wrong.any():
        depth = depth_inside(largest_piece(wrong))
        places = np.argwhere(depth >= (1 - _DEPTH) * depth.max())
    else:  # a click that confirms
        places = np.argwhere(truth if truth.any() else ~truth)
    place = places[random.integers(len(places))]
    is_on = int(truth[tuple(place)])
    if random.random() < _BESIDE:
        place = np.clip(place + random.integers(-_BESIDE_PX, _BESIDE_PX + 1, 2), 0, np.array(truth.shape) - 1)
    return int(place[1]), int(place[0]), is_on


def _error_at(click: tuple[int, int, int], wrong: torch.Tensor, is_mended: torch.Tensor) -> torch.Tensor:
    """Return the connected error HxW that a click lies in, empty if it is mended already or the click lies in none."""
    column, row, _ = click
    if not wrong[row, column] or is_mended[row, column]:
        return torch.zeros_like(wrong)
    return torch.as_tensor(pieces_at(wrong.cpu().numpy(), row, column), device=wrong.device)


def _marks(clicks: list[tuple[int, int, int]], images: torch.Tensor) -> torch.Tensor:
    given = torch.tensor(clicks, device=images.device)
    return click_marks(given[:, :2], given[:, 2], images.shape[2:])
