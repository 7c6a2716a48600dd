"""Precision: the number format in which a network computes."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "fp32", "bf16")
_BF16_BELOW = 0.95  # share of fp32's time below which `auto` takes bf16 on a CPU
_ROUNDS = 5  # in which the CPU is measured, after one to warm up


def check_precision(precision: str) -> None:
    """Raise a ValueError unless `precision` is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}")


def autocast_to(precision: str, device_type: str) -> AbstractContextManager:
    """Return the context that makes a network compute in a precision.

    Args:
        precision: `fp32`, `bf16`, or `auto` for what `auto_is_bf16` says.
        device_type: `cpu` or `cuda`.

    Returns:
        autocast to bf16, or, in fp32, the faster library for products that are as exact.
    """
    if precision == "bf16" and not has_native_bf16(device_type):
        _warn_of_emulation(device_type)
    if precision == "bf16" or (precision == "auto" and auto_is_bf16(device_type)):
        return torch.autocast(device_type, dtype=torch.bfloat16)
    return _products_by_onednn() if device_type == "cpu" and _onednn_is_better() else nullcontext()


def auto_is_bf16(device_type: str) -> bool:
    """Return whether `auto` computes in bf16 on a device.

    A GPU needs instructions for it. A CPU must also be faster with them: some have half the rate of fp32.

    Args:
        device_type: `cpu` or `cuda`; for any other the answer is False.
    """
    return has_native_bf16(device_type) and (device_type != "cpu" or _bf16_is_faster())


def has_native_bf16(device_type: str) -> bool:
    """Return whether a device has instructions for bf16 products.

    A CPU has them with AMX or AVX512_BF16, a GPU from compute capability 8 on.

    Args:
        device_type: `cpu` or `cuda`; for any other the answer is False.
    """
    if device_type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def has_amx() -> bool:
    """Return whether the CPU has AMX, a unit for products of bf16 matrices."""
    return torch.cpu.get_capabilities().get("amx_bf16", False)


@functools.cache
def _bf16_is_faster() -> bool:
    """Return whether this CPU is clearly faster in bf16 than in fp32; the answer holds for the whole process."""
    share = _bf16_share()
    faster = share < _BF16_BELOW
    logger.info(
        "precision auto on this CPU: %s, since bf16 takes %.2f of fp32's time", "bf16" if faster else "fp32", share
    )
    return faster


def _bf16_share() -> float:
    """Measure the time in bf16 as a share of that in fp32, for a convolution and a product of an encoder's shapes.

    Processor time of one thread is counted, and the shortest of each, so that other load does not change the answer.
    """
    image, kernel = torch.full((1, 64, 88, 88), 0.5), torch.full((64, 64, 3, 3), 0.5)  # random numbers would
    tokens, matrix = torch.full((1024, 768), 0.5), torch.full((768, 768), 0.5)  # change those drawn after them
    works = (lambda: F.conv2d(image, kernel, padding=1), lambda: F.linear(tokens, matrix))
    seconds = {"fp32": 0.0, "bf16": 0.0}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for work in works:
                rounds = [{precision: _seconds(work, precision) for precision in seconds} for _ in range(1 + _ROUNDS)]
                for precision in seconds:
                    seconds[precision] += min(times[precision] for times in rounds[1:])
    finally:
        torch.set_num_threads(threads)
    return seconds["bf16"] / seconds["fp32"]


def _seconds(work: Callable[[], Any], precision: str) -> float:
    with torch.autocast("cpu", enabled=False), autocast_to(precision, "cpu"):
        start = time.thread_time()
        work()
        return time.thread_time() - start


@contextmanager
def _products_by_onednn() -> Iterator[None]:
    """Let oneDNN compute products of fp32 matrices instead of MKL.

    The only switch for it permits rounding to bf16, which oneDNN does on CPUs with AMX. Enter this context only where
    `_onednn_is_better`.
    """
    switch: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


@functools.cache
def _onednn_is_better() -> bool:
    """Return whether oneDNN's products of fp32 matrices are faster than MKL's and as exact on this CPU.

    MKL is slow on AMD's CPUs. A test on the encoder's shapes finds out once whether oneDNN rounds anything.
    """
    capabilities = torch.cpu.get_capabilities()
    amd = str(capabilities.get("cpu_name", "")).startswith("AMD") and capabilities.get("avx512_f", False)
    better = bool(amd) and not has_amx() and _onednn_rounds_nothing()
    logger.info("products in fp32 on this CPU: by %s", "oneDNN, faster than MKL and as exact" if better else "MKL")
    return better


def _onednn_rounds_nothing() -> bool:
    """Return whether products by oneDNN are those of numbers with all 24 bits of fp32."""
    matrix = 1 + torch.rand(256, 768, generator=torch.Generator().manual_seed(0))  # few of them are bf16 numbers
    with torch.no_grad(), _products_by_onednn():
        products = [matrix @ torch.eye(768), matrix[:, :64] @ torch.eye(64), torch.eye(256) @ matrix]
        batched = torch.stack([matrix[:, :64]] * 2) @ torch.eye(64).expand(2, -1, -1)
    exact = [matrix, matrix[:, :64], matrix]
    return all(map(torch.equal, products, exact)) and torch.equal(batched[1], matrix[:, :64])


@functools.cache
def _warn_of_emulation(device_type: str) -> None:
    logger.warning("this %s computes bf16 by emulation, far slower than fp32: give --precision auto", device_type)
