"""Precision: the number format in which a network computes."""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager, nullcontext

import torch

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "bf16")


def check_precision(precision: str) -> None:
    """Raise a ValueError unless `precision` is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}")


def autocast_to(precision: str, device_type: str) -> AbstractContextManager:
    """Return the context that makes a network compute in a precision.

    Args:
        precision: `fp32`, `bf16`, or `auto` for bf16 where the device has it natively and fp32 elsewhere.
        device_type: `cpu` or `cuda`.

    Returns:
        autocast to bf16, or a null context.
    """
    native = has_native_bf16(device_type)
    if precision == "bf16" and not native:
        _warn_of_emulation(device_type)
    if precision == "bf16" or (precision == "auto" and native):
        return torch.autocast(device_type, dtype=torch.bfloat16)
    return nullcontext()


def has_native_bf16(device_type: str) -> bool:
    """Return whether a device has instructions for bf16 products, which make them faster than fp32.

    A CPU has them with AMX or AVX512_BF16, a GPU from compute capability 8 on.

    Args:
        device_type: `cpu` or `cuda`; for any other the answer is False.
    """
    if device_type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def _warn_of_emulation(device_type: str) -> None:
    logger.warning("this %s computes bf16 by emulation, far slower than fp32: give --precision auto", device_type)
