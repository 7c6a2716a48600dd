"""Run a grid of trainings and write its table.

From the repository's root: `python -m study run --config study/tiny.json --dataset_dir ACDC --output_dir DIR`. Killed
and started again it goes on where it was; a cell that failed is tried again.
"""

from __future__ import annotations

import logging
from pathlib import Path

import fire

from components.files import write_atomically
from study.cells import CellError, run_cell
from study.grid import read_grid
from study.report import to_markdown

logger = logging.getLogger("study")


def run(config: str, dataset_dir: str, output_dir: str, only: str = "") -> None:
    """Run what is not finished of a study, cell after cell, and write `table.md` after each.

    Args:
        config: JSON file of the grid.
        dataset_dir: of ACDC, or a data set in its layout.
        output_dir: where each cell has a folder.
        only: run those cells only whose folder begins with this.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    cells = read_grid(config)
    output = Path(output_dir).resolve()
    failed = []
    for number, cell in enumerate(cells, start=1):
        if not cell.name.startswith(only):
            continue
        logger.info("%s of %s: %s", number, len(cells), cell.name)
        try:
            run_cell(cell, dataset_dir=str(Path(dataset_dir).resolve()), output_dir=output)
        except CellError as error:
            logger.error("%s failed: %s", cell.name, error)
            failed.append(cell.name)
        with write_atomically(output / "table.md") as partial:
            partial.write_text(to_markdown(cells, output))
    if failed:
        raise SystemExit(f"{len(failed)} cells failed, to be tried again by the same command: {', '.join(failed)}")


if __name__ == "__main__":
    fire.Fire({"run": run})
