"""Optimization of an encoder from scratch: parameter groups for weight decay, and gradient clipping."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine
from monai.engines import IterationEvents
from torch import nn


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into weights of linear layers and convolutions, which decay, and others.

    Args:
        network: the network. Biases, norms, positional embeddings and tokens have another name than `weight` or a
            single axis.
        weight_decay: weight decay of the first group.

    Returns:
        two parameter groups for an optimizer, the second with a weight decay of 0.
    """
    trained = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
    decays = {name for name, weight in trained if name.endswith(".weight") and weight.ndim > 1}
    return [
        {"params": [weight for name, weight in trained if name in decays], "weight_decay": weight_decay},
        {"params": [weight for name, weight in trained if name not in decays], "weight_decay": 0.0},
    ]


class GradientClipping:
    """Ignite handler that clips the norm of all gradients together, before each optimizer step of MONAI's trainer.

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
        """Scale the gradients down if their norm exceeds the largest one."""
        nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)
