"""Tables, as text and CSV, and a plot of ratios."""

import csv
import logging
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.timing import Ratio, ratio_of

logger = logging.getLogger(__name__)

COLOURS = {"ours": "#1f77b4", "other": "#9a9a9a"}

INTRODUCTION = """\
Contenders take turns, A B A B, in one process. A ratio is a contender's time divided by the baseline's in the same
round: the median over the rounds, in brackets the smallest and the largest. Seconds are specific to this run: compare
ratios. Weights are random, as speed does not depend on them; images are random or synthetic."""


@dataclass(frozen=True)
class Row:
    """One contender in one case.

    Args:
        case: the conditions that all contenders of a comparison share.
        contender: its name; names that begin with `ours` appear in the summary.
        seconds: median over the rounds; None if nothing was measured.
        ratio: time over the baseline's; None if nothing was measured.
        extra: further columns by name.
    """

    case: str
    contender: str
    seconds: float | None
    ratio: Ratio | None
    extra: Mapping[str, float | str] = field(default_factory=dict)


@dataclass
class Table:
    """The results of one section.

    Args:
        section: the section's name.
        baseline: the contender that the ratios of all cases refer to.
        note: what is measured and how, in sentences.
        per: the unit of work that the seconds refer to, such as `a batch`.
        rows: the results.
    """

    section: str
    baseline: str
    note: str
    per: str
    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        case: str,
        times: Mapping[str, Sequence[float]],
        extra: Mapping[str, Mapping[str, float | str]] | None = None,
    ) -> None:
        """Add a comparison, and log that it is done.

        Args:
            case: name of the case.
            times: seconds in each round, by contender, including the baseline.
            extra: further columns, by contender.
        """
        for name, seconds in times.items():
            ratio = ratio_of(list(seconds), list(times[self.baseline]))
            self.rows.append(Row(case, name, statistics.median(seconds), ratio, (extra or {}).get(name, {})))
        logger.info("measured %s, %s", self.section, case)

    @property
    def extra_columns(self) -> list[str]:
        """The further columns of all rows, in order of appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row.extra))

    def summary(self) -> list[str]:
        """List the ratios of this project's contenders, a line each."""
        return [
            f"{self.section}, {row.case}: {row.contender} / {self.baseline} = {row.ratio}"
            for row in self.rows
            if row.contender.startswith("ours") and row.ratio is not None
        ]


def write_report(tables: Sequence[Table], *, host: str, title: str, output_dir: Path) -> str:
    """Write `benchmarks.md`, `benchmarks.csv` and `benchmarks.png`.

    Args:
        tables: one per section.
        host: description of the machine, in one line.
        title: description of the run, in one line.
        output_dir: folder to write to, created if missing.

    Returns:
        the text of `benchmarks.md`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    text = to_markdown(tables, host=host, title=title)
    (output_dir / "benchmarks.md").write_text(text)
    write_csv(tables, output_dir / "benchmarks.csv")
    plot(tables, title, output_dir / "benchmarks.png")
    return text


def to_markdown(tables: Sequence[Table], *, host: str, title: str) -> str:
    """Format the summary and all tables as Markdown; see `write_report`."""
    lines = ["# Benchmarks", "", title, "", f"Host: {host}.", "", INTRODUCTION, "", "## Summary", ""]
    lines += [f"- {sentence}" for table in tables for sentence in table.summary()]
    for table in tables:
        header = ["case", "contender", f"ratio to {table.baseline}", *table.extra_columns, f"s, {table.per}"]
        body = [
            [row.case, row.contender, _cell(row.ratio), *_extra(table, row), _cell(row.seconds)] for row in table.rows
        ]
        lines += ["", f"## {table.section}", "", textwrap.fill(table.note.strip(), 120), "", *_aligned([header, *body])]
    return "\n".join(lines) + "\n"


def write_csv(tables: Sequence[Table], path: Path) -> None:
    """Write all rows to one file; columns that a section does not have are empty."""
    columns = ["section", "case", "contender", "baseline", "ratio", "ratio_low", "ratio_high", "seconds", "seconds_per"]
    columns += dict.fromkeys(column for table in tables for column in table.extra_columns)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for table in tables:
            for row in table.rows:
                record: dict[str, Any] = {"section": table.section, "case": row.case, "contender": row.contender}
                record |= {"baseline": table.baseline, "seconds": row.seconds, "seconds_per": table.per, **row.extra}
                if row.ratio is not None:
                    record |= {"ratio": row.ratio.median, "ratio_low": row.ratio.low, "ratio_high": row.ratio.high}
                writer.writerow(record)


def plot(tables: Sequence[Table], title: str, path: Path) -> None:
    """Draw every ratio as a bar, with a panel per section."""
    shown = [[row for row in table.rows if row.ratio and row.contender != table.baseline] for table in tables]
    heights = [max(2, len(rows)) + 2 for rows in shown]
    figure = Figure(figsize=(11, 0.26 * sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\nTime over the baseline's (logarithmic), median and range of the rounds", fontsize=10)
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, table, rows in zip(panels, tables, shown, strict=True):
        _draw_panel(axes, table, rows)
    figure.savefig(path, dpi=120)


def _draw_panel(axes: Axes, table: Table, rows: Sequence[Row]) -> None:
    ratios = [row.ratio for row in rows if row.ratio]
    medians = [ratio.median for ratio in ratios]
    colours = [COLOURS["ours" if row.contender.startswith("ours") else "other"] for row in rows]
    axes.set_xscale("log")
    axes.barh(range(len(rows)), [median - 1 for median in medians], left=1, color=colours, height=0.7)
    spread = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
    axes.errorbar(medians, range(len(rows)), xerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    for index, ratio in enumerate(ratios):
        axes.annotate(
            f"{ratio.median:.3g}",
            (ratio.high if ratio.median >= 1 else ratio.low, index),
            xytext=(4 if ratio.median >= 1 else -4, 0),
            textcoords="offset points",
            va="center",
            ha="left" if ratio.median >= 1 else "right",
            fontsize=8,
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row.case}: {row.contender}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    # Leave room for the numbers beside the bars, and show a range in which noise does not look like a difference.
    axes.set_xlim(min([0.5, *(ratio.low / 1.6 for ratio in ratios)]), max([2, *(ratio.high * 1.6 for ratio in ratios)]))
    axes.set_title(f"{table.section}: 1 is {table.baseline}", fontsize=10, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)


def _extra(table: Table, row: Row) -> list[str]:
    return [_cell(row.extra.get(column)) for column in table.extra_columns]


def _cell(value: Ratio | float | str | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a Markdown table that also reads well as plain text."""
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    rows = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return [rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]]
