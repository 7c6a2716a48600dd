"""The planes in which the slices of a volume lie, and the neighbours of a slice."""

import torch

PLANES = (1, 3)  # how many may be seen


def in_plane(volume: torch.Tensor, plane: int) -> torch.Tensor:
    """Return a volume whose slices lie in another plane; called twice, it returns the volume itself.

    Args:
        volume: ...xHxWxD, slices last.
        plane: 0 for the volume as it is, 1 for slices across its width, 2 for slices across its height.

    Returns:
        a view of the volume, ...xHxDxW for plane 1 and ...xDxWxH for plane 2.
    """
    return volume.transpose(-1, -1 - plane)


def with_neighbours(volume: torch.Tensor) -> torch.Tensor:
    """Give each slice of a volume the one before and the one after it as channels.

    The first and the last slice replace their own missing neighbour.

    Args:
        volume: ...x1xHxWxD, slices last.

    Returns:
        ...x3xHxWxD.
    """
    before = torch.cat([volume[..., :1], volume[..., :-1]], dim=-1)
    after = torch.cat([volume[..., 1:], volume[..., -1:]], dim=-1)
    return torch.cat([before, volume, after], dim=-4)


def check_planes(planes: int) -> None:
    """Check a number of planes.

    Args:
        planes: 1 for the volume's own, 3 for all.

    Raises:
        ValueError: for another number.
    """
    if planes not in PLANES:
        raise ValueError(
            f"expected 1 or 3 planes, the slices' own or all, received {planes!r}: give for example --planes 1"
        )
