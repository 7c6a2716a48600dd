"""Section `inference`: segmentation of whole volumes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.bundle import inference
from benchmarks.contenders import ReferenceEncoder, precisions
from benchmarks.memory import MIB, Work, peak_mib
from benchmarks.report import Table
from benchmarks.settings import Settings
from benchmarks.timing import Contender, measure, synchronizer
from components.sam.encoder import SamEncoder

HEAD = "ViTHead"
BASELINE = "segment_anything"
OUT_CHANNELS = 4
FP32_BYTES = 4

NOTE = """
One volume through the inferer and network of `inference.json`, with the ViT head, without a cache. `peak MiB` is the
memory that this adds to a fresh process, `output MiB` the size of the logits.
"""


def run(settings: Settings) -> Table:
    """Time a shallow and a deep volume, and measure their peak memory."""
    table = Table("inference", BASELINE, NOTE, "a slice")
    names = [BASELINE, *(f"ours {precision}" for precision in precisions(settings.device))]
    for depth in settings.volume_depths:
        segment = {name: _segmenter(settings, name) for name in names}
        volume, one_batch = _volume(settings, depth), _volume(settings, min(4, depth))
        contenders = {
            name: Contender(partial(run, volume), warm_up=partial(run, one_batch)) for name, run in segment.items()
        }
        times = measure(contenders, rounds=settings.rounds, synchronize=synchronizer(settings.device))
        a_slice = {name: [seconds / depth for seconds in turns] for name, turns in times.items()}
        extra = {name: _memory(settings, name, depth) for name in names}
        table.add(f"{depth} slices", a_slice, extra)
    return table


def _segmenter(settings: Settings, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that segments a volume 1x3xHxWxD with `segment_anything`'s encoder or with ours."""
    encoder = SamEncoder(settings.model_type, image_size=settings.image_size).to(settings.device)
    precision = "fp32" if name == BASELINE else name.removeprefix("ours ")
    chosen = ReferenceEncoder(encoder) if name == BASELINE else encoder
    parser = inference(settings, chosen, head=HEAD, precision=precision)
    network: Any = parser.get_parsed_content("network").eval()
    inferer = parser.get_parsed_content("inferer")

    def segment(volume: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return inferer(volume, network)

    return segment


def _prepare_volume(settings: Settings, name: str, depth: int) -> Work:
    """Build a network and a volume; return the function that segments it."""
    return partial(_segmenter(settings, name), _volume(settings, depth))


def _memory(settings: Settings, name: str, depth: int) -> dict[str, float | str]:
    """Measure the peak memory of segmenting a volume."""
    peak = peak_mib(partial(_prepare_volume, settings, name, depth))
    if peak is None:
        return {}
    output = OUT_CHANNELS * settings.canvas_size**2 * depth * FP32_BYTES / MIB
    return {"peak MiB": f"{peak:.0f}", "output MiB": f"{output:.3g}"}


def _volume(settings: Settings, depth: int) -> torch.Tensor:
    size = (1, 3, settings.canvas_size, settings.canvas_size, depth)
    return torch.randint(0, 256, size, device=settings.device).float()
