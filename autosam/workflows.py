"""The commands that run a bundle's workflow, and what they say at their end."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autosam.folders import DATA_FILE, DEFAULT, INFERENCE, MODEL, TRAIN, find_bundle, is_shipped, own_copy
from autosam.record import inference_settings, read_record, write_record
from autosam.runner import LOG, BundleRun
from autosam.workers import DaskWorkers, Job, LocalWorkers

Knobs = Mapping[str, str]  # as they were typed


def segment(
    image: Path,
    output: Path,
    bundle: str,
    knobs: Knobs,
    *,
    measure: bool,
    dry_run: bool,
    verbose: bool,
    workers: int = 1,
    scheduler: str | None = None,
) -> None:
    """Segment the images that are not done yet.

    Args:
        image: the image, DICOM study, folder of them or CSV list.
        output: folder of label maps and pictures.
        bundle: a bundle's folder or name.
        knobs: knobs of `inference.json`.
        measure: whether to measure ventricular function as well.
        dry_run: whether to print the command only.
        verbose: whether to show MONAI's lines.
        workers: processes that share the cases; 1 for this process.
        scheduler: address or file of a Dask cluster to run on instead.

    Raises:
        FileNotFoundError: if there is no such image or bundle.
        ValueError: if the bundle cannot segment or measure, or a knob is unknown.
    """
    run, start = _inference(image, output, bundle, knobs, overlay="function" if measure else None), time.monotonic()
    print(f"$ {run.line}", flush=True)
    if dry_run:
        return
    job = Job(run, output / LOG, verbose)
    runner = DaskWorkers(job, scheduler) if scheduler else LocalWorkers(job, workers) if workers != 1 else None
    cohorts: list[Any] = []

    def segment_all(workflow: Any) -> None:
        from autosam.cohort import Cohort

        cohorts.append(Cohort(workflow, runner))
        cohorts[0].run()

    try:
        run(job.log, verbose=verbose, use=segment_all)
    finally:  # also if some images failed
        cohort = cohorts[0] if cohorts else None
        if cohort and (cohort.segmented or cohort.done_before):
            done = cohort.segmented
            before = f"; {cohort.done_before} done before" if cohort.done_before else ""
            skipped = f"; {len(cohort.skipped)} skipped, see the log" if cohort.skipped else ""
            print(
                f"segmented {done} image{'s' * (done != 1)} with {run.bundle.name}{before}{skipped} ({_since(start)})"
            )
            _say_files(output, output / "function.html" if measure else _pictures(output))


def correct(
    image: Path, output: Path, bundle: str, knobs: Knobs, clicks: Path, *, dry_run: bool, verbose: bool
) -> None:
    """Segment an image and correct it by clicks.

    Args:
        image: the image.
        output: folder of label map and picture.
        bundle: a bundle's folder or name.
        knobs: knobs of `inference.json`.
        clicks: JSON file of the clicks.
        dry_run: whether to print the command only.
        verbose: whether to show MONAI's lines.

    Raises:
        FileNotFoundError: if there is no such image, bundle or file of clicks.
        ValueError: if the bundle cannot segment or correct, a knob is unknown, or a click does not fit.
    """
    if not (clicks := clicks.expanduser()).is_file():
        raise FileNotFoundError(f"there is no {clicks}: expected a JSON file of clicks")
    run, start = _inference(image, output, bundle, {**knobs, "clicks": clicks}, overlay="correct"), time.monotonic()
    if _run(run, output / LOG, dry_run=dry_run, verbose=verbose) is None:
        return
    print(f"corrected 1 image with {run.bundle.name} ({_since(start)})")
    _say_files(output, _pictures(output))


def _inference(image: Path, output: Path, bundle: str, knobs: Mapping[str, Any], *, overlay: str | None) -> BundleRun:
    """Return the run that segments, with an overlay of `inference.json`: `function`, `correct` or none."""
    image = image.expanduser()
    if not image.exists():
        raise FileNotFoundError(f"there is no {image}: expected an image, a DICOM study, a folder or a CSV list")
    folder = find_bundle(bundle, INFERENCE)
    overlays, known = inference_settings(folder)
    if overlay:
        find_bundle(folder, f"{overlay}.json")
        overlays = [*overlays, overlay]
    options = {**known, "dataset_dir": image, "output_dir": output, "overlays": True, **knobs}
    return BundleRun("measuring" if overlay == "function" else "inferring", folder, ["inference", *overlays], options)


def train(
    bundle: str, data: str, labelled: int | None, overlays: Sequence[str], knobs: Knobs, *, dry_run: bool, verbose: bool
) -> None:
    """Train a bundle in the user's own folder.

    Args:
        bundle: a bundle's folder or name.
        data: folder of the labelled cases; an empty text for that of the bundle's `data.json`.
        labelled: number of labelled cases to train on; None for the config's.
        overlays: names of further configs, such as `neck`.
        knobs: knobs of `train.json`.
        dry_run: whether to print the command only.
        verbose: whether to show MONAI's lines.

    Raises:
        FileNotFoundError: if there is no such bundle or folder.
        ValueError: if the bundle cannot be trained, has no such overlay, or needs a folder of data.
    """
    found = find_bundle(bundle, TRAIN)
    for name in overlays:
        find_bundle(found, f"{name}.json")
    count = {} if labelled is None else {"labelled_cases": labelled}
    options = {**_data(found, data), **count, **knobs}
    folder = found if dry_run else own_copy(found)
    run, start = BundleRun("training", folder, ["train", *overlays], options), time.monotonic()
    if not dry_run:
        write_record(folder, overlays, options)
    if (made := _run(run, folder / LOG, dry_run=dry_run, verbose=verbose)) is None:
        return
    checkpoints = _handler(made, "train#handlers", "TrainingCheckpoints")
    score = checkpoints.best_score
    best = "no validation" if score is None else f"mean Dice {score:.3f} on the validation cases"
    if checkpoints.start_score is not None:
        best += f", {checkpoints.start_score:.3f} before"
    print(f"trained {folder.name}: {best} ({_since(start)})")
    print(f"model:   {checkpoints.ckpt_dir / 'model.pt'}")
    print(f"log:     {folder / LOG}")
    print(f"next:    autosam evaluate {shlex.quote(str(folder))}")


def evaluate(bundle: str, data: str, output: Path | None, knobs: Knobs, *, dry_run: bool, verbose: bool) -> None:
    """Score a bundle on the test cases of its data.

    Args:
        bundle: a bundle's folder or name.
        data: folder of the labelled cases; an empty text for that of the last training.
        output: folder of the results; None for `eval` in the bundle's folder, or, of a bundle that came with the
            package, for `<bundle>_eval` in the working directory.
        knobs: knobs of `evaluate.json`.
        dry_run: whether to print the command only.
        verbose: whether to show MONAI's lines.

    Raises:
        FileNotFoundError: if there is no such bundle or folder.
        ValueError: if the bundle cannot be evaluated, or needs a folder of data.
    """
    folder = find_bundle(bundle, "evaluate.json")
    record = read_record(folder)
    known = record["knobs"]
    options = {} if "dataset_dir" in known and not data else _data(folder, data)
    if is_shipped(folder) and "cache_dir" in json.loads((folder / f"configs/{TRAIN}").read_text()):
        options["cache_dir"] = "$None"  # nothing is written to where the package is installed
    output = output or (Path(f"{folder.name}_eval") if is_shipped(folder) else folder / "eval")
    configs = ["train", *record["overlays"], "evaluate"]
    run = BundleRun("evaluating", folder, configs, {**known, **options, "output_dir": output, **knobs})
    if (made := _run(run, output / LOG, dry_run=dry_run, verbose=verbose)) is not None:
        _say_scores(made, output, next_command=f"autosam segment IMAGE --bundle {shlex.quote(str(folder))}")


def demo(output: Path, *, verbose: bool) -> None:
    """Train a head on synthetic patients and score others.

    Args:
        output: folder of the demo, in which the bundle is copied.
        verbose: whether to show MONAI's lines.
    """
    folder = own_copy(find_bundle(DEFAULT, "demo.json"), output / DEFAULT)
    for workflow, configs in (("training", ["train", "demo"]), ("evaluating", ["train", "evaluate", "demo"])):
        made = _run(BundleRun(workflow, folder, configs), folder / LOG, dry_run=False, verbose=verbose)
    _say_scores(made, folder / "demo/eval", next_command="autosam segment IMAGE, or autosam new NAME FOLDER")


def pack(bundle: str, output: str, model: str | None, encoder_url: str) -> None:
    """Write a bundle's archive.

    Args:
        bundle: a bundle's folder or name.
        output: folder of the archive.
        model: the trained model; None for the bundle's own, or for the one that comes with the package.
        encoder_url: address of an encoder that is too large for an archive.

    Raises:
        FileNotFoundError: if there is no such bundle or model.
        ValueError: if the bundle has no archive.
    """
    from release.__main__ import build

    folder = find_bundle(bundle, INFERENCE)
    if (folder / DATA_FILE).is_file():
        name = str(folder)
    else:  # its configs are those of the package, also in a copy
        name = folder.name
        trained = folder / MODEL
        model = model or (str(trained) if not is_shipped(folder) and trained.is_file() else None)
    (archive,) = build(output, bundle=name, model=model, encoder_url=encoder_url)
    print(f"packed {folder.name}: {archive} ({archive.stat().st_size / 1e6:.0f} MB)")
    print(f"next:    unpack it, and autosam segment IMAGE --bundle {folder.name}")


def _run(run: BundleRun, log: Path, *, dry_run: bool, verbose: bool) -> Any:
    """Show a run's command and run it; return MONAI's parser, or None if it is only shown."""
    print(f"$ {run.line}", flush=True)
    return None if dry_run else run(log, verbose=verbose)


def _say_files(output: Path, look_at: Path | str) -> None:
    """Say where the labels, what to look at and the log of a segmentation are."""
    print(f"labels:  {output}/<case>_pred.*")
    print(f"look at: {look_at}")
    print(f"log:     {output / LOG}")


def _say_scores(made: Any, output: Path, *, next_command: str) -> None:
    """Say how an evaluation has ended."""
    report = _handler(made, "validate#handlers", "EvaluationReport")
    print(f"\n{report.table}\n")
    print(f"scored {report.n_cases} test cases: mean Dice {report.mean_dice:.3f}")
    print(f"scores:  {output / 'metrics.csv'}, labels beside it")
    print(f"look at: {_pictures(output)}")
    print(f"next:    {next_command}")


def _handler(made: Any, handlers: str, kind: str) -> Any:
    """Return the handler of a kind that a run has made."""
    return next(each for each in made.get_parsed_content(handlers) if type(each).__name__ == kind)


def _pictures(folder: Path) -> str:
    """Return the first picture of a folder by name, and how many others there are."""
    pictures = sorted(folder.glob("*_overlay.png"))
    return f"{pictures[0]}" + f" and {len(pictures) - 1} more" * (len(pictures) > 1) if pictures else "no picture"


def _data(bundle: Path, data: str) -> dict[str, Any]:
    """Return the option for the folder of the labelled cases, after checking that there is one."""
    if data:
        if not (folder := Path(data).expanduser()).is_dir():
            raise FileNotFoundError(f"there is no folder {folder}: expected --data to be that of the labelled cases")
        return {"dataset_dir": folder}
    if not (bundle / DATA_FILE).is_file():
        raise ValueError(f"{bundle.name} needs labelled cases: give --data FOLDER, such as ACDC's")
    return {}


def _since(start: float) -> str:
    seconds = time.monotonic() - start
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
