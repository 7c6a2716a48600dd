"""The tables of a study, for methods and ablations, beside the paper's; as Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from components.base.atomic_write import write_atomically
from study.data import ACDC, StudyData
from study.grid import Ablation, Grid, Method
from study.published import MeanStd, published_scores, published_variant, round_half_up

_PAPER = (
    "The paper's scores come from other test patients, and its ASSD is a different measure (95th percentile of the "
    "Hausdorff distance in pixels, 0 for a miss)."
)
_DICE_IN_PERCENT = "Dice in %"

_BY = ["method", "labelled_patients", "value", "split"]
_NUMERIC = r"(?:[\d.,\s±<+*-]|of|to)*"
_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def main_caption(methods: Iterable[Method], data: StudyData = ACDC) -> str:
    """Return the explanation of `main_table`."""
    return f"{_measures(data)}Misses are summed over splits and classes.{_of_paper(methods)}"


def ablation_caption(methods: Iterable[Method], data: StudyData = ACDC) -> str:
    """Return the explanation of `ablation_table`."""
    return f"{_measures(data)}All other settings are the method's own.{_of_paper(methods)}"


def _measures(data: StudyData) -> str:
    return (
        f"Dice in percent: mean over the test {data.item}s of a split, for each class and then over classes. The table "
        "shows the mean ± standard deviation (ddof 1) over the splits, or only the mean if there is a single split. "
        f"ASSD in {data.length} on the native grid, averaged in the same way; a miss (a class is present, but no "
        f"{data.element} of it was predicted) counts as the {data.item}'s diagonal. "
    )


def _of_paper(methods: Iterable[Method]) -> str:
    return f" {_PAPER}" if published_by_title(methods) else ""


def split_means(scores: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Average over the volumes of a split, then over classes; nan (a class in neither mask) is ignored.

    Args:
        scores: as `read_scores` returns them.
        measure: `dice` or `assd_mm`.

    Returns:
        a column for each class, in the order of `scores`, and `mean`; the index is `method`, `labelled_patients`,
        `value` and `split`.
    """
    means = scores.groupby([*_BY, "class"])[measure].mean().unstack("class")[list(scores["class"].unique())]
    return means.assign(mean=means.mean(axis=1))


def main_table(
    scores: pd.DataFrame, misses: pd.DataFrame, methods: Iterable[Method], data: StudyData = ACDC
) -> pd.DataFrame:
    """Build the paper's table 1 from the finished cells: methods by number of labelled patients.

    Args:
        scores: as `read_scores` returns them, of at least one cell; ablations are ignored.
        misses: as `read_misses` returns them, of the same cells.
        methods: methods in the order of the table.
        data: data of the study.

    Returns:
        a row of text for each method and number of labelled patients, fewest first. It has the paper's scores if the
        method names a row of the paper's table. `main_caption` explains the table.
    """
    scores, misses = (table[table["ablation"] == ""] for table in (scores, misses))
    methods = tuple(methods)
    has_paper = bool(published_by_title(methods))
    dice, assd_mm = 100 * split_means(scores, "dice"), split_means(scores, "assd_mm")["mean"]
    missed = misses.groupby(["method", "labelled_patients"])[["n_misses", "n_volumes"]].sum()
    rows = []
    for count in sorted(scores["labelled_patients"].unique()):
        for method in methods:
            if (method.key, count) not in missed.index:
                continue
            of_splits = dice.loc[(method.key, count)]
            row: dict[str, Any] = {data.labelled: str(count), "method": method.title}
            row |= {name: _mean_and_spread(of_splits[name], 1) for name in of_splits}
            row[f"ASSD in {data.length}"] = _mean_and_spread(assd_mm.loc[(method.key, count)], 2)
            row["misses"] = "{n_misses} of {n_volumes}".format(**missed.loc[(method.key, count)])
            row["splits"] = str(len(of_splits))
            rows.append(row | (_published_columns(method, count) if has_paper else {}))
    return pd.DataFrame(rows)


def ablation_table(scores: pd.DataFrame, ablation: Ablation, grid: Grid) -> pd.DataFrame:
    """Build a table that compares the values of one setting, such as the paper's tables 2 and 3.

    Args:
        scores: as `read_scores` returns them, of at least one cell.
        ablation: the ablation.
        grid: the study, whose cells show which value is the unchanged method.

    Returns:
        rows of text for each method and number of labelled patients with at least one finished variant. They hold the
        mean Dice and mean ASSD of each value, followed by the paper's if there are any; see `ablation_caption`.
    """
    own = _ablation_scores(scores, ablation, grid)
    labelled = grid.data.labelled
    measures = {
        _DICE_IN_PERCENT: 100 * split_means(own, "dice")["mean"],
        f"ASSD in {grid.data.length}": split_means(own, "assd_mm")["mean"],
    }
    rows = []
    for method in grid.methods:
        for count in sorted(set(own.loc[own["method"] == method.key, "labelled_patients"])):
            row = {"method": method.title, labelled: str(count)}
            for measure, means in measures.items():
                of_values = dict(list(means.loc[(method.key, count)].groupby("value")))
                rows.append(row | {"measure": measure, "source": "this study"} | _ours(of_values, ablation, measure))
                theirs = {v: _published_value(method, ablation, v, count, measure) for v in ablation.values}
                if any(theirs.values()):
                    rows.append(row | {"measure": measure, "source": "paper"} | theirs | {"splits": "4"})
    return pd.DataFrame(rows, columns=["method", labelled, "measure", "source", *ablation.values, "splits"])


def published_by_title(methods: Iterable[Method]) -> dict[str, dict[int, float]]:
    """Return the paper's mean Dice in percent of the methods it reports, by title and number of labelled volumes."""
    dice = {}
    for method in methods:
        if method.paper is not None:
            reported = {count: published_scores(method.paper, count) for count in (0, 1, 5)}
            dice[method.title] = {count: scores.mean.mean for count, scores in reported.items() if scores}
    return dice


def write_table(table: pd.DataFrame, stem: Path, caption: str) -> list[Path]:
    """Write a table as Markdown, CSV and LaTeX. The LaTeX table uses the package booktabs.

    Args:
        table: the table, of text.
        stem: path of the files without a suffix.
        caption: shown in Markdown and LaTeX.

    Returns:
        the files.
    """
    escaped = table.rename(columns=_escape_pipes).map(_escape_pipes)
    numeric = [is_numeric(table[name]) for name in table]
    aligned = ["right" if right else "left" for right in numeric]
    markdown = escaped.to_markdown(index=False, disable_numparse=True, colalign=aligned if len(table) else None)
    latex = table.to_latex(
        index=False,
        escape=True,
        caption=caption.translate(_LATEX),
        label=f"tab:{stem.name}",
        column_format="".join("r" if right else "l" for right in numeric),
    )
    texts = {
        ".md": f"{caption}\n\n{markdown}\n",
        ".csv": table.to_csv(index=False),
        ".tex": latex.replace("±", r"$\pm$").replace("<", "$<$"),
    }
    files = [stem.with_name(stem.name + suffix) for suffix in texts]
    for file, text in zip(files, texts.values(), strict=True):
        with write_atomically(file) as partial:
            partial.write_text(text, encoding="utf-8")
    return files


def is_numeric(column: pd.Series) -> bool:
    """Return whether a column of text holds only numbers, such as `39.3 ± 12.8` or `3 of 96`, and blanks."""
    text = column.fillna("").astype(str)
    return bool(text.str.fullmatch(_NUMERIC).all() and text.str.contains(r"\d").any())


def _ablation_scores(scores: pd.DataFrame, ablation: Ablation, grid: Grid) -> pd.DataFrame:
    """Return the scores of an ablation's variants, and of the unchanged methods under the value without knobs."""
    varied = scores[scores["ablation"] == ablation.key]
    variants = [cell.variant for cell in grid.cells if cell.variant and cell.variant.ablation == ablation.key]
    own = scores[(scores["ablation"] == "") & scores["method"].isin(ablation.methods)]
    # From the grid, not from the finished cells: a variant without finished cells must stay empty.
    unchanged = [value for value in ablation.values if value not in {variant.value for variant in variants}]
    in_table = pd.MultiIndex.from_frame(varied[["method", "labelled_patients"]])
    own = own[pd.MultiIndex.from_frame(own[["method", "labelled_patients"]]).isin(in_table)]
    return pd.concat([varied, *(own.assign(value=value) for value in unchanged)], ignore_index=True)


def _published_columns(method: Method, labelled_patients: int) -> dict[str, str]:
    """Return the columns with the paper's scores, empty if it reports none."""
    published = published_scores(method.paper, labelled_patients) if method.paper else None
    return {
        "paper's Dice": published.mean.as_text(1) if published else "",
        "paper's ASSD": published.assd.as_text(2) if published and published.assd else "",
    }


def _ours(of_values: Mapping[str, pd.Series], ablation: Ablation, measure: str) -> dict[str, str]:
    """Format the scores of each value of an ablation, and the number of splits."""
    decimals = _decimals(measure)
    lengths = sorted({len(values) for values in of_values.values()})
    ours = {value: _mean_and_spread(of_values.get(value, pd.Series()), decimals) for value in ablation.values}
    return ours | {"splits": " to ".join(str(n) for n in dict.fromkeys((lengths[0], lengths[-1])))}


def _published_value(method: Method, ablation: Ablation, value: str, labelled_patients: int, measure: str) -> str:
    published = published_variant(method.paper, ablation.key, value, labelled_patients) if method.paper else None
    if published is None:
        return ""
    number = published.dice if measure == _DICE_IN_PERCENT else published.assd
    return "" if number is None else round_half_up(number, _decimals(measure))


def _decimals(measure: str) -> int:
    return 1 if measure == _DICE_IN_PERCENT else 2


def _mean_and_spread(values: pd.Series, decimals: int) -> str:
    """Format the mean and the standard deviation (ddof 1) over splits, ignoring nan; empty if there are no values."""
    values = values.dropna()
    if len(values) > 1:
        return MeanStd(values.mean(), values.std(ddof=1)).as_text(decimals)
    return round_half_up(values.mean(), decimals) if len(values) else ""


def _escape_pipes(text: str) -> str:
    return str(text).replace("|", r"\|")
