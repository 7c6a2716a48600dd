"""Section `cell`: duration of a training of the paper, extrapolated from measured parts."""

import tempfile
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.bundle import HeadAlone, training, training_knobs, write_patients
from benchmarks.contenders import Encode, ReferenceEncoder, precisions
from benchmarks.report import Table
from benchmarks.settings import Settings
from benchmarks.timing import Contender, measure, synchronizer
from benchmarks.training_costs import Costs, Plan, cached_seconds, every_step_seconds, head_seconds
from components.base.precision import autocast_to
from components.sam.encoder import SamEncoder

BASELINE = "segment_anything, every step"
CELL_HEADS = ("LinearHead", "ViTHead")
PLAN = Plan(slices=20, validation_slices=285, **training_knobs("epochs", "batch_size", "val_interval", "views"))

NOTE = f"""
EXTRAPOLATED, not run: one labelled patient ({PLAN.slices} slices), {PLAN.epochs} epochs at batch {PLAN.batch_size},
validated on {PLAN.validation_slices} slices every {PLAN.val_interval} epochs, {PLAN.views} views per slice. The parts
are measured in the same rounds: augmenting a slice, encoding an image with each encoder, reading an embedding from the
cache, the head's training step and its forward pass. Reading files, metrics and resampling to the volumes' own grids
take the same time for all contenders and are left out. The baseline computes in fp32; `head alone` is the time without
any encoding.
"""


def run(settings: Settings) -> Table:
    """Measure the parts and sum them, for the heads of `CELL_HEADS`."""
    table = Table("cell", BASELINE, NOTE, "the cell, extrapolated")
    names = precisions(settings.device)
    with tempfile.TemporaryDirectory() as folder:
        times = measure(
            _parts(settings, folder, names),
            rounds=settings.rounds,
            turn_seconds=settings.turn_seconds,
            synchronize=synchronizer(settings.device),
        )
    for head in CELL_HEADS:
        for precision in names:
            every_step = _costs(times, head, "reference", "fp32")
            ours = _costs(times, head, "encode", precision)
            totals = {
                BASELINE: [every_step_seconds(PLAN, costs) for costs in every_step],
                "ours": [cached_seconds(PLAN, costs) for costs in ours],
                "head alone": [head_seconds(PLAN, costs) for costs in ours],
            }
            table.add(f"{head}, {precision}, extrapolated", totals)
    return table


def _costs(times: dict[str, list[float]], head: str, encode: str, precision: str) -> list[Costs]:
    """Collect the costs of the parts in each round."""
    parts: Sequence[list[float]] = (
        times["augment"],
        times[f"{encode} {precision}"],
        [seconds / PLAN.batch_size for seconds in times[f"hit {precision}"]],
        times[f"step {head} {precision}"],
        times[f"forward {head} {precision}"],
    )
    return [Costs(*round_costs) for round_costs in zip(*parts, strict=True)]


def _parts(settings: Settings, folder: str, names: Sequence[str]) -> dict[str, Contender]:
    """Build a contender for each part."""
    encoder = SamEncoder(settings.model_type, image_size=settings.image_size, cache_dir=f"{folder}/embeddings")
    encoder.to(settings.device)
    reference = ReferenceEncoder(encoder).to(settings.device)
    dataset_dir = write_patients(folder, settings)
    fresh = training(
        settings, reference, head=CELL_HEADS[0], precision="fp32", dataset_dir=dataset_dir, views=0
    ).get_parsed_content("train#dataset")
    images = _new_images(settings, PLAN.batch_size)
    labels = torch.randint(0, 4, images[:, :1].shape, device=settings.device).float()
    parts = {
        "augment": Contender(lambda: fresh[0]),
        "reference fp32": Contender(partial(_encode_new, reference, settings)),
    }
    for precision in names:
        encode = partial(_encode, encoder, precision)
        parts[f"encode {precision}"] = Contender(partial(_encode_new, encode, settings))
        parts[f"hit {precision}"] = Contender(partial(encode, images))
        for head in CELL_HEADS:
            alone = HeadAlone(settings, [(encoder(images), images, labels)], head=head, precision=precision)
            parts[f"step {head} {precision}"] = Contender(alone.train)
            parts[f"forward {head} {precision}"] = Contender(alone.segment)
    return parts


def _encode(encoder: SamEncoder, precision: str, images: torch.Tensor) -> torch.Tensor:
    """Encode images or read them from the cache, in the precision that the network would set."""
    with autocast_to(precision, images.device.type):
        return encoder(images)


def _encode_new(encode: Encode, settings: Settings) -> torch.Tensor:
    return encode(_new_images(settings, 1))


def _new_images(settings: Settings, count: int) -> torch.Tensor:
    """Draw random images in 0..255, which no cache holds."""
    size = (count, 3, settings.canvas_size, settings.canvas_size)
    return torch.randint(0, 256, size, device=settings.device).float()
