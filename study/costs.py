"""How long a study will take: from its finished cells, else from a step of each network on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from monai.bundle import ConfigParser

from components.base.precision import autocast_to
from components.base.volume_metadata import is_picture
from components.data.geometry import slices_last
from components.data.transforms import LoadVolumed
from study.cells import Stage, has_failed, is_finished, list_cases_to_score, list_stages, read_record
from study.execution import Task
from study.grid import LABELLED_CASES, UNLABELLED

_STARTUP_S = 10.0  # to start Python, import MONAI and load volumes
_WEIGHTS = ("sam_checkpoint", "start_checkpoint")  # speed does not depend on the weights
_POOL_SIZE = 512  # number of phantoms that PhantomMixing draws from


@dataclass(frozen=True)
class Speed:
    """Seconds per slice: a training step, a prediction and, with a frozen encoder, an embedding.

    Args:
        train_s: of a training step.
        predict_s: of a prediction.
        encode_s: of an embedding; 0 without a frozen encoder.
        encoder: what the frozen encoder is called, with the size of its images.
    """

    train_s: float
    predict_s: float
    encode_s: float = 0.0
    encoder: str = ""


def name_without_split(task: Task) -> str:
    """Return the name that a task shares with those of other splits, which take about as long."""
    return task.name.rpartition("/split_")[0] or task.name


def measured_seconds(tasks: Sequence[Task], output_dir: Path) -> dict[str, float]:
    """Return the median seconds of the tasks that ran without interruption, by their name without the split."""
    seconds: dict[str, list[float]] = {}
    for task in tasks:
        record = read_record(output_dir / task.name)
        if record and is_finished(output_dir / task.name) and not record["interrupted"]:
            seconds.setdefault(name_without_split(task), []).append(sum(record["seconds"].values()))
    return {name: median(values) for name, values in seconds.items()}


def remaining_seconds(tasks: Sequence[Task], output_dir: Path) -> float | None:
    """Estimate the seconds that the unfinished tasks take one after the other, None if no task is finished yet."""
    measured = measured_seconds(tasks, output_dir)
    if not measured:
        return None
    unknown = median(measured.values())
    return sum(
        measured.get(name_without_split(task), unknown) for task in tasks if not is_finished(output_dir / task.name)
    )


def cost_table(tasks: Sequence[Task], *, dataset_dir: str, output_dir: Path) -> pd.DataFrame:
    """Estimate how long a study will take, without running it.

    Cells share the embeddings of a frozen encoder: each image is counted in the first task that encodes it.

    Args:
        tasks: all tasks of the study, in order.
        dataset_dir: as for `study.cells.list_stages`.
        output_dir: folder of the study.

    Returns:
        a row for all splits of a task, with the columns `run` (their name), `cells`, `done`, `failed`, `minutes left`
        and `by`, the basis of the estimate: `finished cells` or `a step on this machine`.
    """
    measured = measured_seconds(tasks, output_dir)
    estimate = _Estimate(dataset_dir, output_dir)
    rows: dict[str, dict[str, Any]] = {}
    for task in tasks:
        name, folder = name_without_split(task), output_dir / task.name
        row = rows.setdefault(name, {"cells": 0, "done": 0, "failed": 0, "minutes left": 0.0})
        row["cells"] += 1
        row["done"] += is_finished(folder)
        row["failed"] += has_failed(folder)
        row["minutes left"] += 0 if is_finished(folder) else (measured.get(name) or estimate.seconds(task)) / 60
        row["by"] = "finished cells" if name in measured else "a step on this machine"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run").reset_index()


class _Estimate:
    """Estimates the seconds of tasks that were never run; times each network once and counts each embedding once."""

    def __init__(self, dataset_dir: str, output_dir: Path) -> None:
        self._dataset_dir = dataset_dir
        self._output_dir = output_dir
        self._speeds: dict[str, Speed] = {}
        self._embedded: dict[tuple[str, Any, str], int] = {}  # number of slices, by encoder, split and subset
        self._depths: dict[str, int] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def seconds(self, task: Task) -> float:
        """Estimate the seconds of a task."""
        stages = list_stages(task, dataset_dir=self._dataset_dir, output_dir=self._output_dir)
        return sum(_STARTUP_S + self._stage_seconds(stage, task) for stage in stages)

    def _stage_seconds(self, stage: Stage, task: Task) -> float:
        parser = _without_weights(stage)
        config: Callable[[str], Any] = parser.get_parsed_content

        def knob(name: str, otherwise: Any) -> Any:
            return config(name) if name in parser.get() else otherwise

        network = name_without_split(task).partition(f"/{task.method.counts}_")[0]
        if network not in self._speeds:
            self._speeds[network] = measure_speed(parser)
        speed = self._speeds[network]
        axis, views = knob("slice_axis", None), knob("test_time_views", 1)
        if stage.name == "evaluating":
            shown = self._slices(list_cases_to_score(parser), axis) * views
            return shown * speed.predict_s + self._newly_embedded(stage, speed, "test", shown) * speed.encode_s
        if "steps_per_epoch" in parser.get():
            return config("epochs") * config("steps_per_epoch") * config("batch_size") * speed.train_s
        unlabelled = stage.name == "training" and UNLABELLED in stage.configs
        epochs, slices = self._size(
            name_without_split(task), config, repeats=unlabelled or task.method.data_file is not None
        )
        slices = slices or self._slices(config("train#dataset#data"), axis)
        parser["epochs"] = epochs  # so that nothing below reads the volumes again
        share = knob("phantom_share", 0)
        phantoms = slices * share / (1 - share)
        seconds = epochs * (slices + phantoms) * speed.train_s
        if stage.name == "pretraining":
            return 2 * seconds  # two views of each slice
        validated = self._slices(config("validate#dataset#data"), axis) * views
        if stage.knobs[LABELLED_CASES] == 0:  # then nothing is validated
            validated = 0
        seconds += -(-epochs // config("val_interval")) * validated * speed.predict_s
        taught = epochs * self._slices(config("train#dataset#unlabelled"), axis) if unlabelled else 0
        seconds += taught * speed.predict_s
        if speed.encode_s == 0:
            return seconds
        drawn = epochs * phantoms if config("views") == 0 else min(_POOL_SIZE, epochs * phantoms)  # then none is cached
        shown = slices * min(config("views") or epochs, epochs) + drawn + taught
        seconds += self._newly_embedded(stage, speed, "training", shown) * speed.encode_s
        return seconds + self._newly_embedded(stage, speed, "validation", validated) * speed.encode_s

    def _size(self, name: str, config: Callable[[str], Any], *, repeats: bool) -> tuple[int, int]:
        """Return the epochs of a training and, if it repeats slices, the number in one of them, else 0.

        Both may need its volumes, which are read once for all splits.
        """
        if name not in self._sizes:
            self._sizes[name] = config("epochs"), len(config("train#dataset")) if repeats else 0
        return self._sizes[name]

    def _newly_embedded(self, stage: Stage, speed: Speed, subset: str, slices: float) -> float:
        """Return the number of slices that no earlier task has embedded, and count those of a cache as embedded."""
        if stage.knobs.get("cache_dir") is None:
            return slices
        encoder = f"{speed.encoder}, {stage.knobs.get('sam_checkpoint', '')}"  # the latter is None for random weights
        key = (encoder, stage.knobs.get("split_seed"), subset)
        before = self._embedded.get(key, 0)
        self._embedded[key] = max(before, int(slices))
        return max(0.0, slices - before)

    def _slices(self, cases: Sequence[Mapping[str, str]], slice_axis: int | None = None) -> int:
        for case in cases:
            if case["image"] not in self._depths:
                self._depths[case["image"]] = _depth(case["image"], slice_axis)
        return sum(self._depths[case["image"]] for case in cases)


def _without_weights(stage: Stage) -> ConfigParser:
    """Read the configs of a stage, without what only its results depend on."""
    parser = stage.parser()
    parser["bundle_root"] = str(stage.method.folder)
    weights = _WEIGHTS if stage.name != "evaluating" else _WEIGHTS[:1]  # the other says what it was trained with
    parser.update({name: None for name in (*weights, "cache_dir") if name in parser.get()})
    if "trained_with" in parser.get():
        parser.update({"trained_with#trained_views": None})  # which a start, left out here, may have been shown
    if stage.name == "training":
        parser["train#dataset#progress"] = False
    return parser


def _depth(image: str, slice_axis: int | None) -> int:
    """Return the number of slices of a volume, 1 of a picture."""
    if is_picture(image):
        return 1
    return slices_last(LoadVolumed("image")({"image": image})["image"], slice_axis).shape[-1]


def measure_speed(parser: ConfigParser) -> Speed:
    """Time a step of a bundle's network on one batch of noise, after a warm-up step.

    Args:
        parser: the bundle's configs, without checkpoints.
    """
    network, batch_size, size, device = (
        parser.get_parsed_content(name) for name in ("network", "batch_size", "crop_size", "device")
    )
    shown = parser.get_parsed_content("patch_size") if "patch_size" in parser.get() else size  # a part in training
    images = torch.randint(256, (batch_size, 3, size, size), device=device).float()
    frozen = hasattr(network, "encoder") and not any(p.requires_grad for p in network.encoder.parameters())
    if not frozen:
        patches = images[..., :shown, :shown]
        return Speed(_timed(network.train(), patches, learn=True), _timed(network.eval(), images))
    with autocast_to(network.precision, device.type):
        encode_s = _timed(network.encoder, images)
        encoder = f"{network.encoder.model_type} at {network.encoder.image_size}"
        if not hasattr(network, "head"):  # the time of SAM's own decoder is negligible
            return Speed(0.0, 0.0, encode_s, encoder)
        with torch.no_grad():
            embeddings = network.encoder(images).float()
        return Speed(_timed(network.head, embeddings, learn=True), _timed(network.head, embeddings), encode_s, encoder)


def _timed(module: torch.nn.Module, batch: torch.Tensor, *, learn: bool = False) -> float:
    """Return the seconds per item of a batch, for the forward pass and, with `learn`, the backward pass."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with torch.set_grad_enabled(learn):
            output = module(batch)
        if learn:
            output.float().square().mean().backward()
        if output.is_cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / len(batch)
    return seconds
