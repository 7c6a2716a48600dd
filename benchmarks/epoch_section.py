"""Section `epoch`: an epoch with cached embeddings, one that encodes in every step, and the head's steps alone."""

import itertools
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from monai.bundle import ConfigParser

from benchmarks.bundle import HEADS, Batch, HeadAlone, training, write_patients
from benchmarks.contenders import ReferenceEncoder, precisions
from benchmarks.report import Table
from benchmarks.settings import Settings
from benchmarks.timing import Contender, measure, ratio_of, synchronizer
from components.sam.encoder import SamEncoder

BASELINE = "the head's own steps"
EVERY_STEP = "segment_anything, every step"
FIRST = "ours, first epoch"
LATER = "ours, later epochs"
ENDLESS_VIEWS = 10**6  # so that the views of a new epoch are never cached

NOTE = """
One epoch at batch 4 of the trainer, dataset, loader, loss and optimizer of `train.json` and `sam.json`. The first epoch
augments, encodes and fills the cache; later ones read from it. The baseline trains the same head on embeddings in
memory: forward, loss at the logits' full size, backward, optimizer's step. `of every step` is the time as a fraction of
that of an epoch that augments and encodes every slice anew with `segment_anything`'s encoder, in fp32.
"""


def run(settings: Settings) -> Table:
    """Measure all heads, in fp32 and, if the device supports it natively, in bf16."""
    table = Table("epoch", BASELINE, NOTE, "an epoch")
    unseen = itertools.count(2)  # epoch 1 is read from the cache
    with tempfile.TemporaryDirectory() as folder:
        dataset_dir = write_patients(folder, settings)
        encoder = SamEncoder(settings.model_type, image_size=settings.image_size, cache_dir=f"{folder}/embeddings")
        encoder.to(settings.device)
        reference = ReferenceEncoder(encoder)
        for head in HEADS:
            _compare(table, settings, encoder, reference, head=head, dataset_dir=dataset_dir, unseen=unseen)
    return table


def _compare(
    table: Table,
    settings: Settings,
    encoder: SamEncoder,
    reference: ReferenceEncoder,
    *,
    head: str,
    dataset_dir: str,
    unseen: Iterator[int],
) -> None:
    """Time the epochs of one head, all precisions in turns."""
    train = partial(training, settings, head=head, dataset_dir=dataset_dir)
    parsers = {p: train(encoder, precision=p, views=ENDLESS_VIEWS) for p in precisions(settings.device)}
    every_step = train(reference, precision="fp32", views=0).get_parsed_content("train#trainer")
    contenders = {EVERY_STEP: Contender(every_step.run, warm_up=partial(_one_step, every_step))}
    for precision, parser in parsers.items():
        alone = HeadAlone(settings, _batches_in_memory(settings, parser), head=head, precision=precision)
        contenders[f"{BASELINE} {precision}"] = Contender(alone.train)
        contenders[f"{LATER} {precision}"] = Contender(partial(_epoch, parser, itertools.repeat(1)))
        contenders[f"{FIRST} {precision}"] = Contender(
            partial(_epoch, parser, unseen),
            warm_up=lambda: None,  # encoder and head are warm from `_batches_in_memory` and the later epochs
        )
    times = measure(
        contenders,
        rounds=settings.rounds,
        turn_seconds=settings.turn_seconds,
        synchronize=synchronizer(settings.device),
    )
    for precision in parsers:
        shown = {name: times[f"{name} {precision}"] for name in (BASELINE, LATER, FIRST)}
        shown[EVERY_STEP] = times[EVERY_STEP]
        shares = {name: {"of every step": ratio_of(t, times[EVERY_STEP]).median} for name, t in shown.items()}
        table.add(f"{head}, {precision}", shown, shares)


def _epoch(parser: ConfigParser, epochs: Iterator[int]) -> None:
    """Train one epoch on the views of the next epoch number."""
    parser.get_parsed_content("train#dataset").set_epoch(next(epochs))
    parser.get_parsed_content("train#trainer").run()


def _one_step(trainer: Any) -> None:
    """Train on the first batch only."""
    network, batch = trainer.network, next(iter(trainer.data_loader))
    images, labels = (batch[key].to(trainer.state.device) for key in ("image", "label"))
    trainer.loss_function(network(images), labels).backward()


def _batches_in_memory(settings: Settings, parser: ConfigParser) -> list[Batch]:
    """Encode the first epoch's batches."""
    encoder = parser.get_parsed_content("network").encoder
    batches = []
    for batch in parser.get_parsed_content("train#dataloader"):
        images, labels = (batch[key].as_subclass(torch.Tensor).to(settings.device) for key in ("image", "label"))
        batches.append((encoder(images), images, labels))
    return batches
