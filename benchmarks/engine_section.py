"""Section `engines`: the shipped encoder and SAM's, by torch and by the engines that a user could take instead."""

import importlib.util
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.contenders import (
    OURS,
    REFERENCE,
    Encode,
    as_ours,
    build_encoder,
    in_precision,
    precisions,
    random_state_dict,
    segment_anything_encoder,
)
from benchmarks.report import Row, Table
from benchmarks.settings import Settings
from benchmarks.timing import Contender, clock_of, measure, synchronizer
from components.networks.onnx_network import ENGINES, OnnxNetwork
from components.sam.image_encoder import ARCHITECTURES, ImageEncoder
from components.sam.unet_encoder import UNetEncoder

COMPILED = "torch.compile"
SHIPPED = "phantom_unet"
BASELINE = f"{OURS} fp32"

NOTE = """
The same random weights by other engines. ONNX Runtime and OpenVINO compute the file that `torch.onnx.export` makes, for
SAM's encoder from `segment_anything`'s module. `error` is the largest difference from ours in fp32 as a fraction of the
output's range. Exporting and compiling are not counted. On one thread of a CPU, time is the process's own.
"""


def run(settings: Settings) -> Table:
    """Measure both encoders by all engines that are installed; on a GPU by torch and `torch.compile` only."""
    table = Table("engines", BASELINE, NOTE, "a batch")
    device = settings.device
    size, batch = settings.shipped_case
    shipped = UNetEncoder().eval().to(device)
    case = f"{SHIPPED}, {size} px x {batch}"
    _compare(table, settings, case, _by_torch(shipped, device), shipped, torch.randn(batch, 3, size, size))
    size = settings.image_size
    weights = random_state_dict(settings.model_type)
    ours = ImageEncoder(ARCHITECTURES[settings.model_type]).eval().to(device)
    ours.load_state_dict(weights)
    encoders = _by_torch(ours, device)
    encoders[REFERENCE] = build_encoder(REFERENCE, settings.model_type, weights, image_size=size, device=device)
    theirs = segment_anything_encoder(settings.model_type, weights, image_size=size).eval()
    _compare(table, settings, f"{settings.model_type}, {size} px", encoders, theirs, torch.randn(1, 3, size, size))
    for engine in ENGINES:
        if importlib.util.find_spec(engine) is None:
            table.rows.append(Row("all", f"{engine}: not installed", None, None))
    return table


def _compare(
    table: Table,
    settings: Settings,
    case: str,
    encoders: Mapping[str, Encode],
    exported: nn.Module,
    images: torch.Tensor,
) -> None:
    """Time an encoder by torch and by all engines, in turns.

    Args:
        table: the results are added to it.
        settings: sizes of the run.
        case: names the comparison.
        encoders: the ways of torch, `BASELINE` among them.
        exported: the module that other engines compute, of the same weights.
        images: BxCxHxW.
    """
    if settings.device.type == "cpu":
        encoders = {**encoders, **_by_engines(exported, images)}
    images = images.to(settings.device)
    expected = encoders[BASELINE](images)
    span = float(expected.max() - expected.min())
    errors = {name: float((encode(images).float() - expected).abs().max()) / span for name, encode in encoders.items()}
    times = measure(
        {name: Contender(partial(encode, images)) for name, encode in encoders.items()},
        rounds=settings.rounds,
        turn_seconds=settings.turn_seconds,
        synchronize=synchronizer(settings.device),
        clock=clock_of(settings.device),
    )
    table.add(case, times, {name: {"error": error} for name, error in errors.items()})


def _by_torch(module: nn.Module, device: torch.device) -> dict[str, Encode]:
    """Return ways for torch to compute a module: as it is, and compiled where there is a C++ compiler."""
    encoders = {f"{OURS} {precision}": as_ours(module, precision, device) for precision in precisions(device)}
    if shutil.which("c++") is not None:
        compiled = torch.compile(module)
        encoders |= {f"{COMPILED} {precision}": in_precision(compiled, precision) for precision in precisions(device)}
    return encoders


def _by_engines(module: nn.Module, images: torch.Tensor) -> dict[str, Encode]:
    """Export a module, and return the ways for the installed engines to compute it."""
    installed = [engine for engine in ENGINES if importlib.util.find_spec(engine) is not None]
    if not installed:
        return {}
    encoders: dict[str, Encode] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "encoder.onnx")
        torch.onnx.export(module, (images,), path, dynamo=True, opset_version=20, verbose=False)
        for engine in installed:
            for precision in precisions(images.device) if engine == "openvino" else ["fp32"]:
                encoders[f"{engine} {precision}"] = OnnxNetwork(path, engine, precision)
    return encoders
