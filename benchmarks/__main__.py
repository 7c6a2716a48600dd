"""Compare this project's speed and memory with other projects', and write tables and a plot.

Run from the repository root: `python -m benchmarks --output_dir DIR`.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import (
    cell_section,
    click_section,
    cohort_section,
    encoder_section,
    engine_section,
    epoch_section,
    inference_section,
)
from benchmarks.contenders import silence_random_weights
from benchmarks.report import Table, write_report
from benchmarks.settings import SECTIONS, Settings, describe_host
from components.sam.image_encoder import ARCHITECTURES

RUN: dict[str, Callable[[Settings], Table]] = {
    "encoder": encoder_section.run,
    "engines": engine_section.run,
    "epoch": epoch_section.run,
    "cell": cell_section.run,
    "inference": inference_section.run,
    "clicks": click_section.run,
    "cohort": cohort_section.run,
}


def parse_arguments(arguments: list[str] | None = None) -> Settings:
    """Read the command line, and set the number of threads."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for benchmarks.md, .csv and .png")
    parser.add_argument("--model_type", choices=list(ARCHITECTURES), default="vit_b", help="encoder (%(default)s)")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated list (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="number of timings of each contender (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--quick", action="store_true", help="smoke test: vit_tiny, tiny images, 1 round")
    options = parser.parse_args(arguments)
    unknown = set(options.sections.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    if options.rounds < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--rounds and --threads must be 1 or more")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return Settings(
        output_dir=options.output_dir,
        model_type="vit_tiny" if options.quick else options.model_type,
        sections=tuple(section for section in SECTIONS if section in options.sections.split(",")),
        rounds=1 if options.quick else options.rounds,
        quick=options.quick,
    )


def main() -> None:
    """Run the requested sections; the report is rewritten after each, so that an aborted run keeps its results."""
    settings = parse_arguments()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    silence_random_weights()
    torch.manual_seed(0)
    smoke = ", a smoke test whose numbers mean nothing" if settings.quick else ""
    title = f"{settings.model_type}, {settings.rounds} round{'s' if settings.rounds > 1 else ''}{smoke}."
    host, text = describe_host(settings), ""
    tables: list[Table] = []
    for section in settings.sections:
        tables.append(RUN[section](settings))
        text = write_report(tables, host=host, title=title, output_dir=settings.output_dir)
    print(text)


if __name__ == "__main__":
    main()
