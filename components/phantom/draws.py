"""Random draws of both phantom functions: ranges, subjects, smooth random fields."""

from dataclasses import fields

import torch
from torch import Tensor

Range = tuple[float | Tensor, float | Tensor]  # numbers, or tensors (count,) with one value per subject
Draw = dict[str, Tensor]


def between(ends: Range, fraction: Tensor) -> Tensor:
    """Return the value at `fraction` (..., count) of the way from the first end to the second."""
    low, high = ends
    return low + (high - low) * fraction


def draw_uniform(count: int, ranges: object, generator: torch.Generator) -> Draw:
    """Draw each field of a dataclass of ranges; a field ending in `_chance` becomes 0 or 1."""
    names = [field.name for field in fields(ranges)]  # type: ignore[arg-type]
    unit = torch.rand(2, len(names), count, generator=generator, device=generator.device)
    draw = {}
    for position, name in enumerate(names):
        low, high = getattr(ranges, name)
        if torch.as_tensor(low > high).any():
            raise ValueError(f"Expected {name}=(low, high), received {(low, high)}: swap them.")
        value = between((low, high), unit[0, position])
        draw[name] = (unit[1, position] < value).to(value.dtype) if name.endswith("_chance") else value
    return draw


def select(draw: Draw, index: Tensor) -> Draw:
    """Pick or repeat subjects of a draw by a tensor of their positions (B,)."""
    return {name: value[index] for name, value in draw.items()}


def _spline_basis(count: int, positions: Tensor) -> Tensor:
    """Return the values (P, count) of cubic B-splines over 0..1 at positions (P,); they are constant outside."""
    knots = torch.arange(count, device=positions.device) - 1.0
    distance = (positions.clamp(0, 1)[:, None] * (count - 3) - knots).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp_min(0) ** 3 / 6
    return torch.where(distance < 1, near, far)


def smooth_field(coefficients: Tensor, size_hw: tuple[int, int], extent_hw: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Turn standard normal coefficients (..., n, n) into smooth fields (..., H, W) of about unit variance.

    `extent_hw` is the fraction of the field, around its centre, that the image covers.
    """
    bases = []
    for size, extent in zip(size_hw, extent_hw, strict=True):
        positions = ((torch.arange(size, device=coefficients.device) + 0.5) / size - 0.5) * extent + 0.5
        bases.append(_spline_basis(coefficients.shape[-1], positions))
    return 2 * (bases[0] @ coefficients @ bases[1].T)  # cubic B-splines halve the standard deviation
