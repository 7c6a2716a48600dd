"""Section `encoder`: encoders of several projects, at several image and batch sizes."""

import statistics
from collections.abc import Mapping
from functools import partial

import torch

from benchmarks.contenders import (
    BF16,
    OURS,
    OURS_VIT_T,
    OURS_VIT_T_BF16,
    REFERENCE,
    Encode,
    build_encoder,
    encoder_names,
    precisions,
    random_state_dict,
)
from benchmarks.flops import encoder_flops
from benchmarks.memory import Work, peak_mib
from benchmarks.report import Row, Table
from benchmarks.settings import Settings
from benchmarks.timing import Contender, clock_of, measure, synchronizer
from components.base.precision import autocast_to
from components.sam.image_encoder import ARCHITECTURES

TOLERANCE = 1e-4  # as a fraction of the output's range
GEMM = "GEMM"

NOTE = """
All encoders but MobileSAM's, `vit_t`, have the same weights; `error` is the largest difference from ours in fp32 as a
fraction of our output's range, at batch 1. `of peak` is the useful work (linear layers on real tokens, attention
products, patch embedding, neck; no padding) per second, as a fraction of what a square matrix product of the same
precision reaches in the same rounds, by the library that ours uses. On one thread of a CPU, time is the process's own.
`peak MiB` is the memory that the first forward pass adds to a fresh process.
"""


def run(settings: Settings) -> Table:
    """Measure all encoders that can be built on this machine.

    Raises:
        RuntimeError: when an encoder's output differs from ours, so that the times cannot be compared.
    """
    table = Table("encoder", REFERENCE, NOTE, "a batch")
    names = encoder_names(settings.device)
    weights = random_state_dict(settings.model_type)
    largest = settings.encoder_cases[0]
    peaks = {name: peak_mib(partial(_prepare_forward, settings, name, largest)) for name in names}
    for size in dict.fromkeys(size for size, _ in settings.encoder_cases):
        encoders = {
            name: build_encoder(name, settings.model_type, weights, image_size=size, device=settings.device)
            for name in names
        }
        errors = _check_agreement(encoders, torch.randn(1, 3, size, size, device=settings.device))
        for case in [case for case in settings.encoder_cases if case[0] == size]:
            _compare(table, settings, encoders, case=case, errors=errors, peaks=peaks if case == largest else {})
    if not any(name.startswith("transformers") for name in names):
        table.rows.append(Row("all", "transformers: not installed", None, None))
    return table


def _prepare_forward(settings: Settings, name: str, case: tuple[int, int]) -> Work:
    """Build an encoder and its input; return its forward pass."""
    size, batch = case
    weights = random_state_dict(settings.model_type)
    encode = build_encoder(name, settings.model_type, weights, image_size=size, device=settings.device)
    images = torch.randn(batch, 3, size, size, device=settings.device)
    return partial(encode, images)


def _check_agreement(encoders: Mapping[str, Encode], images: torch.Tensor) -> dict[str, float]:
    """Return each encoder's largest difference from ours, as a fraction of our output's range, except MobileSAM's."""
    expected = encoders[OURS](images)
    span = float(expected.max() - expected.min())
    errors = {
        name: float((encode(images) - expected).abs().max()) / span
        for name, encode in encoders.items()
        if name not in (OURS_VIT_T, OURS_VIT_T_BF16)
    }
    for name, error in errors.items():
        if not name.endswith(BF16) and not error <= TOLERANCE:
            raise RuntimeError(
                f"expected {name} to agree with ours within {TOLERANCE:g} of the output's range, received {error:g}: "
                "their times cannot be compared"
            )
    return errors


def _compare(
    table: Table,
    settings: Settings,
    encoders: Mapping[str, Encode],
    *,
    case: tuple[int, int],
    errors: Mapping[str, float],
    peaks: Mapping[str, float | None],
) -> None:
    """Time all encoders and a matrix product, in turns, for one image and batch size."""
    size, batch = case
    images = torch.randn(batch, 3, size, size, device=settings.device)
    matrix = torch.randn(settings.gemm_size, settings.gemm_size, device=settings.device)
    contenders = {name: Contender(partial(encode, images)) for name, encode in encoders.items()}
    for precision in precisions(settings.device):
        contenders[f"{GEMM} {precision}"] = Contender(partial(_multiply, matrix, precision))
    times = measure(
        contenders,
        rounds=settings.rounds,
        turn_seconds=settings.turn_seconds,
        synchronize=synchronizer(settings.device),
        clock=clock_of(settings.device),
    )
    peak_seconds = {precision: times.pop(f"{GEMM} {precision}") for precision in precisions(settings.device)}
    useful = batch * encoder_flops(ARCHITECTURES[settings.model_type], size) / (2 * settings.gemm_size**3)
    extra: dict[str, dict[str, float | str]] = {}
    for name, seconds in times.items():
        extra[name] = {"images/s": batch / statistics.median(seconds)}
        if name in errors:
            gemm_seconds = peak_seconds["bf16" if name.endswith(BF16) else "fp32"]
            share = statistics.median(useful * peak / mine for mine, peak in zip(seconds, gemm_seconds, strict=True))
            extra[name] |= {"of peak": share, "error": errors[name]}
        peak = peaks.get(name)
        if peak is not None:
            extra[name]["peak MiB"] = f"{peak:.0f}"
    table.add(f"{size} px x {batch}", times, extra)


def _multiply(matrix: torch.Tensor, precision: str) -> torch.Tensor:
    """Square a matrix in a precision, by the library that the encoder uses."""
    with torch.no_grad(), autocast_to(precision, matrix.device.type):
        return torch.mm(matrix, matrix)
