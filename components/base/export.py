"""A test of whether torch records a network for another engine."""

import torch


def in_export() -> bool:
    """Return whether a graph is being recorded, by tracing or compiling."""
    if torch.jit.is_scripting():
        return False
    return torch.jit.is_tracing() or torch.compiler.is_compiling()
