"""How an encoder is optimized from scratch: which weights decay, and how long gradients may be."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine
from monai.engines import IterationEvents
from torch import nn


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
