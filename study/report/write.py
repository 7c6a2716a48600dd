"""Writing of the report: each table and figure as a file of its own, and one page with all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure as Picture

from components.base.atomic_write import write_atomically
from study.cells import last_error, read_record
from study.grid import Cell, Grid
from study.report.clinical import CLINICAL_CAPTION, agreement, agreement_table, read_measurements
from study.report.contours import draw_contours
from study.report.embeddings import draw_embeddings, embed_slices, embedding_cell
from study.report.figures import BLAND_ALTMAN_QUANTITIES, draw_bland_altman, draw_dice_by_patients, save_figure
from study.report.page import Figure, Section, Table, write_page
from study.report.scores import count_training_cases, finished_cells, read_misses, read_scores
from study.report.significance import (
    compare_methods,
    matrix_caption,
    significance_caption,
    significance_matrix,
    significance_table,
)
from study.report.tables import (
    ablation_caption,
    ablation_table,
    main_caption,
    main_table,
    published_by_title,
    write_table,
)


def write_report(grid: Grid, output_dir: Path, *, dataset_dir: str, sam_dir: str | None = None) -> Path:
    """Write the report of a study's finished cells.

    Args:
        grid: the study.
        output_dir: folder of the study, to which `report.html`, the scores of every volume, and all tables and figures
            are written.
        dataset_dir: as for `study.cells.list_stages`.
        sam_dir: folder of SAM's checkpoints; None for each bundle's own `models`.

    Returns:
        the page. It contains no times and no count of interruptions: the same cells give the same page.
    """
    cells = finished_cells(grid.cells, output_dir)
    sections = [_state(grid, cells, output_dir)]
    if cells:
        report = _Report(grid, cells, output_dir, dataset_dir=dataset_dir, sam_dir=sam_dir)
        sections = [*report.sections(), *sections]
    page = output_dir / "report.html"
    write_page(page, title=grid.data.title, description=grid.description, sections=sections)
    return page


class _Report:
    """The sections of a report that need at least one finished cell."""

    def __init__(
        self, grid: Grid, cells: Sequence[Cell], output_dir: Path, *, dataset_dir: str, sam_dir: str | None
    ) -> None:
        training = count_training_cases(cells, dataset_dir, grid.data)
        self.grid = grid
        self.data = grid.data
        self.cells = cells
        self.output_dir = output_dir
        self.dataset_dir = dataset_dir
        self.sam_dir = sam_dir
        self.scores = read_scores(cells, output_dir, training_cases=training)
        self.misses = read_misses(cells, output_dir, training_cases=training)
        self.training = training
        self.fewest = min((cell.labelled_cases for cell in cells if cell.labelled_cases), default=0)
        _write_csv(self.scores.rename(columns={"labelled_patients": self.data.column}), output_dir / "scores.csv")

    def sections(self) -> list[Section]:
        """Write all tables and figures, and return the page's sections."""
        clinical = [] if self.data.is_own else [self._clinical()]
        return [self._methods(), *self._ablations(), self._significance(), *clinical, *self._encoder()]

    def _methods(self) -> Section:
        methods = self.grid.methods
        published = published_by_title(methods)
        table = main_table(self.scores, self.misses, methods, self.data)
        hollow = "; hollow markers: the paper's scores, on other test patients" if published else ""
        return Section(
            "Methods",
            tables=[self._table(table, "table_1", main_caption(methods, self.data))],
            figures=[
                *self._figure(
                    draw_dice_by_patients(self.scores, published, self.data),
                    f"dice_by_{self.data.counts}",
                    f"Mean Dice against the number of {self.data.labelled}; bars: standard deviation over splits"
                    f"{hollow}.",
                ),
                *self._figure(
                    draw_contours(
                        self.grid.cells, self.output_dir, dataset_dir=self.dataset_dir, labelled_cases=self.fewest
                    ),
                    "contours",
                    f"Worst, median and best test {self.data.item} of a split, by mean Dice over all methods, trained "
                    f"on {self.fewest} {self.data.labelled}.",
                    suffix=".png",
                ),
            ],
        )

    def _ablations(self) -> list[Section]:
        sections = []
        for ablation in self.grid.ablations:
            table = ablation_table(self.scores, ablation, self.grid)
            if len(table):
                caption = f"{ablation.title}. {ablation_caption(self.grid.methods, self.data)}"
                sections.append(
                    Section(ablation.title, tables=[self._table(table, f"ablation_{ablation.key}", caption)])
                )
        return sections

    def _significance(self) -> Section:
        comparisons = compare_methods(self.scores, self.grid.methods, self.data)
        caption, of_matrix = significance_caption(self.data), matrix_caption(self.data)
        write_table(significance_table(comparisons, self.data), self.output_dir / "significance", caption)
        return Section(
            "Significance",
            text=caption,
            tables=[
                Table(
                    f"{self.data.labelled.capitalize()}: {count}. {of_matrix}", significance_matrix(comparisons, count)
                )
                for count in comparisons["labelled_patients"].unique()
            ],
        )

    def _clinical(self) -> Section:
        measurements = read_measurements(
            self.cells, self.output_dir, dataset_dir=self.dataset_dir, training_cases=self.training
        )
        _write_csv(measurements, self.output_dir / "measurements.csv")
        table = agreement_table(agreement(measurements))
        write_table(table, self.output_dir / "clinical", CLINICAL_CAPTION)
        shown = table[table["quantity"].isin(BLAND_ALTMAN_QUANTITIES)]
        return Section(
            "Clinical measures",
            text="clinical.csv also contains the end-diastolic volumes and the mass at end-systole.",
            tables=[Table(CLINICAL_CAPTION, shown)],
            figures=self._figure(
                draw_bland_altman(measurements, labelled_patients=self.fewest),
                "bland_altman",
                f"Bland-Altman plots, methods trained on {self.fewest} labelled patients: predicted minus true against "
                "their mean; lines: bias and limits of agreement (bias ± 1.96 standard deviations).",
            ),
        )

    def _encoder(self) -> list[Section]:
        cell = embedding_cell(self.cells)
        if cell is None:
            return []
        vectors, groups = embed_slices(
            cell, self.output_dir, dataset_dir=self.dataset_dir, data=self.data, sam_dir=self.sam_dir
        )
        phantoms = "" if self.data.is_own else ", and phantoms"
        figures = self._figure(
            draw_embeddings(vectors, groups),
            "embeddings",
            f"t-SNE of the frozen encoder's embeddings ({cell.method.title}), averaged over space: "
            f"{self.data.seen} of the test {self.data.counts} of split {cell.split}{phantoms}.",
        )
        return [Section("Embeddings of the encoder", figures=figures)] if figures else []

    def _table(self, table: pd.DataFrame, stem: str, caption: str) -> Table:
        write_table(table, self.output_dir / stem, caption)
        return Table(caption, table)

    def _figure(self, figure: Picture | None, stem: str, caption: str, suffix: str = ".svg") -> list[Figure]:
        """Save a figure and return it for the page; an empty list if there was nothing to draw."""
        if figure is None:
            return []
        save_figure(figure, self.output_dir / stem)
        return [Figure(self.output_dir / f"{stem}{suffix}", caption, alt=caption)]


def _state(grid: Grid, cells: Sequence[Cell], output_dir: Path) -> Section:
    """Return the section with the number of finished cells, the package versions and the missing cells."""
    missing = [cell.name for cell in grid.cells if cell not in cells]
    records = [read_record(output_dir / cell.name) or {} for cell in cells]
    versions = sorted(
        {", ".join(f"{name} {version}" for name, version in each["versions"].items()) for each in records}
    )
    text = f"{len(cells)} of {len(grid.cells)} cells are finished."
    table = pd.DataFrame({"cell": missing, "state": [last_error(output_dir / name) or "not run" for name in missing]})
    return Section(
        "State", text="\n\n".join([text, *versions]), tables=[Table("Missing cells.", table)] if missing else []
    )


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    with write_atomically(path) as partial:
        table.to_csv(partial, index=False)
