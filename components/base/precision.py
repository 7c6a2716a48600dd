"""In which number format a network multiplies."""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager, nullcontext

import torch

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "bf16")


def check_precision(precision: str) -> None:
    """Raise a ValueError for a precision that no network knows."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}")


def autocast_to(precision: str, device_type: str) -> AbstractContextManager:
    """Return the context in which a network of a precision computes on a type of device.

    Args:
        precision: `fp32`, `bf16` or `auto`, as of `PromptFreeSam`.
        device_type: `cpu` or `cuda`.

    Returns:
        autocast to bf16, or a context that changes nothing.
    """
    native = has_native_bf16(device_type)
    if precision == "bf16" and not native:
        _warn_of_emulation(device_type)
    if precision == "bf16" or (precision == "auto" and native):
        return torch.autocast(device_type, dtype=torch.bfloat16)
    return nullcontext()


def has_native_bf16(device_type: str) -> bool:
    """Tell whether this machine has instructions for products in bf16, which make them faster than in fp32.

    A CPU has them in AMX or AVX512_BF16, a GPU from compute capability 8 on.

    Args:
        device_type: `cpu` or `cuda`.

    Returns:
        whether; False for other types.
    """
    if device_type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def _warn_of_emulation(device_type: str) -> None:
    logger.warning("this %s computes bf16 by emulation, far slower than fp32: give --precision auto", device_type)
