"""Low-rank updates (LoRA) of an image encoder's queries and values, which are trained while its weights stay frozen."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from components.base.weights import fixed_random_weights
from components.sam.tiny_vit import WindowAttention

RANK = 4
_UPDATE, _FROZEN = ".parametrizations.weight.0.", ".parametrizations.weight.original"  # torch's names in state dicts


class LowRankUpdate(nn.Module):
    """A parametrization that adds a product B A to the weight of a projection.

    Source: SAMed, Zhang and Liu 2023, arXiv:2304.13785: rank 4 on queries and values. B starts at 0, so that the start
    is exactly the frozen weight.

    Args:
        weight: of the projection, OxI.
        is_fused: whether it makes queries, keys and values; the keys then stay as they are.
        groups: number of groups of rows, such as heads. Each group has its own queries, keys and values.
    """

    def __init__(self, weight: torch.Tensor, *, is_fused: bool, groups: int = 1) -> None:
        super().__init__()
        self.is_fused, self.groups = is_fused, groups
        products, parts = (2, 3) if is_fused else (1, 1)
        self.a = nn.Parameter(torch.randn(products, RANK, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(products, weight.shape[0] // parts, RANK))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the updated weight, OxI."""
        with torch.autocast(weight.device.type, enabled=False):
            update = self.b @ self.a
        if self.is_fused:
            update = torch.stack([update[0], torch.zeros_like(update[0]), update[1]])
            update = update.unflatten(1, [self.groups, -1]).transpose(0, 1).flatten(0, 2)
        else:
            update = update[0]
        return weight + update


def add_low_rank_updates(encoder: nn.Module, model_type: str) -> None:
    """Give every projection to queries and values an update, and let nothing else be trained.

    Raises:
        ValueError: if the encoder has no attention.
    """
    encoder.requires_grad_(False)
    with fixed_random_weights():
        updates = _new_updates(encoder)
    if not updates:
        raise ValueError(
            f"trainable_encoder lora adapts attention, which {model_type} lacks: give --trainable_encoder neck or True"
        )
    for name, update in updates.items():
        parametrize.register_parametrization(encoder.get_submodule(name), "weight", update)


def merge_low_rank_updates(encoder: nn.Module) -> None:
    """Put the updates into the weights, which become ordinary ones.

    Not by `parametrize.remove_parametrizations`, which of a copied module changes the original's class.
    """
    for name, module in list(encoder.named_modules()):
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            linear = nn.Linear(module.in_features, module.out_features, device="meta")
            linear.weight, linear.bias = nn.Parameter(module.weight.detach(), requires_grad=False), module.bias
            encoder.set_submodule(name, linear)


def is_update(key: str) -> bool:
    """Return whether a key of a state dict is of an update."""
    return _UPDATE in key


def frozen_weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of an encoder's state dict without updates, under the names that they have without these."""
    return {key.replace(_FROZEN, ".weight"): value for key, value in state.items() if not is_update(key)}


def updated_weights(
    encoder: nn.Module, weights: Mapping[str, torch.Tensor], updates: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the projections' weights with updates.

    Args:
        encoder: the module without updates.
        weights: its frozen weights, by key.
        updates: tensors of another such module's updates, by key.

    Returns:
        tensors by the keys of `weights`.

    Raises:
        RuntimeError: if the updates are those of another encoder.
    """
    with fixed_random_weights():  # the file's replace them
        modules = _new_updates(encoder)
    expected = {f"{name}{_UPDATE}{part}" for name in modules for part in ("a", "b")}
    if expected != updates.keys():
        raise RuntimeError("the checkpoint's low-rank updates are those of another encoder, or not complete")
    merged = {}
    for name, module in modules.items():
        module.load_state_dict({part: updates[f"{name}{_UPDATE}{part}"] for part in ("a", "b")})
        weight = weights[f"{name}.weight"]
        with torch.no_grad():
            merged[f"{name}.weight"] = module.to(weight.device)(weight)
    return merged


def _new_updates(encoder: nn.Module) -> dict[str, LowRankUpdate]:
    """Return a fresh update for each projection to queries or values, by the projection's name."""
    updates = {}
    for name, module in encoder.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(qkv := getattr(module, "qkv", None), nn.Linear):  # SAM, SAM 2
            groups = module.num_heads if isinstance(module, WindowAttention) else 1
            updates[f"{prefix}qkv"] = LowRankUpdate(qkv.weight.detach(), is_fused=True, groups=groups)
        for part in ("q_proj", "v_proj"):  # DINO, SAM 3
            if isinstance(projection := getattr(module, part, None), nn.Linear):
                updates[f"{prefix}{part}"] = LowRankUpdate(projection.weight.detach(), is_fused=False)
    return updates
