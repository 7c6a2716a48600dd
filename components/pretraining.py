"""Training of an encoder with several heads on it at once, on an endless stream of phantom slices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.handlers import from_engine
from torch import nn

from components.phantom.slices import FIELD_MM, phantom_slices


class PhantomStream:
    """An endless stream of labelled phantom slices; a batch depends on seed and number only.

    It begins with normal hearts and grows as wide as phantoms are drawn: a transformer that starts from nothing learns
    them several times sooner in this order (a curriculum: Bengio et al., ICML 2009).

    Args:
        batch_size: slices in a batch.
        seed: which stream, 0 or more.
        device: where the slices are drawn, and stay.
        size: side of the square canvas in pixels.
        field_mm: the same in mm.
        widening_batches: batches over which the draw widens; 0 for the full width from the first.
    """

    def __init__(
        self,
        batch_size: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        size: int = 256,
        field_mm: float = FIELD_MM,
        widening_batches: int = 0,
    ) -> None:
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.size = size
        self.field_mm = field_mm
        self.widening_batches = widening_batches
        self.position = 0  # number of the next batch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield from `position` on images Bx3xHxW, grey values 0..255 on three channels, and labels Bx1xHxW, float."""
        while True:
            index, self.position = self.position, self.position + 1
            width = 1.0 if index >= self.widening_batches else index / self.widening_batches
            images, labels = phantom_slices(
                self.batch_size,
                seed=self.seed,
                index=index,
                device=self.device,
                size=self.size,
                field_mm=self.field_mm,
                width=width,
            )
            yield {"image": images.expand(-1, 3, -1, -1), "label": labels.float()}


class StreamPosition:
    """Ignite handler that has every epoch take the batches of its own iterations, whether or not the run was resumed.

    Args:
        stream: the training data.
    """

    def __init__(self, stream: PhantomStream) -> None:
        self.stream = stream

    def attach(self, engine: Engine) -> None:
        """Register the handler on a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Go to the batch after the last iteration, which a checkpoint has restored by now."""
        self.stream.position = engine.state.iteration


def phantom_stacks(
    stacks: int, slices: int, *, seed: int, size: int = 256, field_mm: float = FIELD_MM
) -> list[dict[str, torch.Tensor]]:
    """Draw a fixed set of phantom slices for validation, in stacks that are scored as volumes are.

    Args:
        stacks: how many.
        slices: slices of a stack D, each of another phantom.
        seed: which stream they are drawn from; another than the training's.
        size: side of the square canvas in pixels.
        field_mm: the same in mm.

    Returns:
        for each stack `image` 1x`size`x`size`xD, grey values 0..255, and `label` of the same shape; drawn on the CPU,
        so that they are the same beside any GPU.
    """
    drawn = [phantom_slices(slices, seed=seed, index=index, size=size, field_mm=field_mm) for index in range(stacks)]
    return [{"image": images.permute(1, 2, 3, 0), "label": labels.permute(1, 2, 3, 0)} for images, labels in drawn]


class JointHead(nn.Module):
    """Several heads on one encoder: in training each slice goes through one of them, in evaluation through all.

    So every step trains the encoder on each slice and every head on its share, at the cost of one head a slice.

    Args:
        heads: by name, each from embeddings Bx256xhxw to logits BxCx4hx4w, with the same C.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(heads)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Decode a batch.

        Args:
            embeddings: Bx256xhxw; in training B is a multiple of the number of heads N.

        Returns:
            in training logits BxCx4hx4w, those of slice i from head i mod N; in evaluation Bx(N*C)x4hx4w, head by head.

        Raises:
            ValueError: when a training batch is no such multiple.
        """
        heads = list(self.heads.values())
        if not self.training:
            return torch.cat([head(embeddings) for head in heads], dim=1)
        if len(embeddings) % len(heads):
            raise ValueError(
                f"expected a batch of slices that the {len(heads)} heads can share evenly, received {len(embeddings)}: "
                f"give --batch_size a multiple of {len(heads)}"
            )
        logits = [head(embeddings[turn :: len(heads)]) for turn, head in enumerate(heads)]
        return torch.stack(logits, dim=1).flatten(0, 1)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split what trains into weights of products and convolutions, which decay, and all else, which does not.

    Args:
        network: the network; biases, norms, positions and tokens are those not called `weight` or with one axis only.
        weight_decay: of the first group.

    Returns:
        two parameter groups for an optimizer.
    """
    trained = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
    decays = {name for name, weight in trained if name.endswith(".weight") and weight.ndim > 1}
    return [
        {"params": [weight for name, weight in trained if name in decays], "weight_decay": weight_decay},
        {"params": [weight for name, weight in trained if name not in decays], "weight_decay": 0.0},
    ]


class GradientClipping:
    """Ignite handler that limits the norm of all gradients together, before each step of MONAI's trainer.

    Args:
        network: the network in training.
        max_norm: largest Euclidean norm.
    """

    def __init__(self, network: nn.Module, max_norm: float) -> None:
        self.network = network
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Register the handler on a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:  # noqa: ARG002 - ignite passes the engine
        """Scale the gradients down where they are too long."""
        nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


def predictions_of_all(output: Any, keys: Sequence[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """List the predictions of all heads, each beside its truth, as one metric takes them.

    Args:
        output: an evaluator's decollated output, with `label` and the predictions, CxHxWxD each.
        keys: of the predictions.

    Returns:
        the predictions, and as many truths.
    """
    pairs = [from_engine([key, "label"])(output) for key in keys]
    return [pred for preds, _ in pairs for pred in preds], [truth for _, truths in pairs for truth in truths]
