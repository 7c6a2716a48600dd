"""Significance of the differences between methods: paired tests over patients, between all pairs of methods."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from study.data import ACDC, StudyData
from study.grid import Method

_COLUMNS = ["labelled_patients", "method_a", "method_b", "n_patients", "mean_difference", "p", "p_adjusted"]
_LEVEL = 0.05
_FRAMES_AND_SPLITS = "its frames and the splits that test it"


def significance_caption(data: StudyData = ACDC) -> str:
    """Return the explanation of the tests."""
    one, several = data.counts.removesuffix("s"), data.counts
    over = "the splits that test it; cases of one group count as one" if data.is_own else _FRAMES_AND_SPLITS
    return (
        f"Two-sided Wilcoxon signed-rank test over {several} on the Dice averaged over classes. A {one} has one value, "
        f"the mean difference A - B, in percentage points, over {over}. p is adjusted by Holm "
        f"for all pairs with the same number of {data.labelled}; untrained methods are compared at every number. "
        f"The test accounts for the choice of {several}, not for the variance between trainings. With fewer than 6 "
        f"{several} no p can be below 0.05."
    )


def matrix_caption(data: StudyData = ACDC) -> str:
    """Return the explanation of `significance_matrix`."""
    return (
        "Mean difference in Dice, row minus column, in percentage points; * where the p adjusted by Holm is below 0.05 "
        f"(two-sided Wilcoxon signed-rank test over {data.counts})."
    )


def compare_methods(scores: pd.DataFrame, methods: Iterable[Method], data: StudyData = ACDC) -> pd.DataFrame:
    """Test every pair of methods with the same number of labelled patients, or cases of a user's own data.

    A patient's two frames, and its volumes in the test sets of several splits, are not independent, so the test uses
    one value per patient. Volumes are compared if both methods were scored on them in the same split. With fewer than 6
    patients no difference can reach p < 0.05.

    Source: pairwise Wilcoxon tests adjusted by Holm, as Wiesenfarth et al., "Methods and open-source toolkit for
    analyzing and visualizing challenge results", Scientific Reports 2021. Differs: two-sided, one value per patient.

    Args:
        scores: as `read_scores` returns them, of at least one cell; ablations are ignored. Cases of ACDC are
            named `<patient>_frame<number>`.
        methods: methods in the order of the table.
        data: data of the study.

    Returns:
        a row for each number of labelled patients and pair of methods with a volume in common. Columns are
        `labelled_patients`, the titles `method_a` and `method_b`, `n_patients`, `mean_difference` (a minus b, in
        percentage points), `p` and `p_adjusted` (by Holm, over all pairs of that number). A method scored with 0
        labelled patients is compared at every number; if it is also trained, `, 0 patients` is appended to its title.
    """
    scores = scores[scores["ablation"] == ""]
    methods = tuple(methods)
    trained = sorted(set(scores["labelled_patients"]) - {0})
    tables = [_compare_at(count, scores, methods, data) for count in trained or [0]]
    return pd.concat(tables, ignore_index=True)


def significance_table(comparisons: pd.DataFrame, data: StudyData = ACDC) -> pd.DataFrame:
    """Format the result of `compare_methods` as text; `significance_caption` explains it."""
    return pd.DataFrame(
        {
            data.labelled: comparisons["labelled_patients"].astype(str),
            "method A": comparisons["method_a"],
            "method B": comparisons["method_b"],
            data.counts: comparisons["n_patients"].astype(str),
            "A - B": comparisons["mean_difference"].map("{:+z.1f}".format),
            "p": comparisons["p"].map(_format_p),
            "adjusted p": comparisons["p_adjusted"].map(_format_p),
        }
    )


def significance_matrix(comparisons: pd.DataFrame, labelled_patients: int) -> pd.DataFrame:
    """Format the pairs with one number of labelled patients as a matrix; `matrix_caption` explains it.

    Args:
        comparisons: as `compare_methods` returns them.
        labelled_patients: the number of labelled patients.

    Returns:
        a numbered row for each method, in the order of the table, and a column for each number.
    """
    pairs = comparisons[comparisons["labelled_patients"] == labelled_patients]
    titles = list(dict.fromkeys([*pairs["method_a"], *pairs["method_b"]]))
    matrix = pd.DataFrame("", index=titles, columns=titles)
    for pair in pairs.itertuples():
        star = "*" if pair.p_adjusted < _LEVEL else ""
        matrix.loc[pair.method_a, pair.method_b] = f"{pair.mean_difference:+z.1f}{star}"
        matrix.loc[pair.method_b, pair.method_a] = f"{-pair.mean_difference:+z.1f}{star}"
    numbers = [str(number) for number in range(1, len(titles) + 1)]
    matrix.columns = pd.Index(numbers)
    matrix.insert(0, "method", [f"{number} {title}" for number, title in zip(numbers, titles, strict=True)])
    return matrix.reset_index(drop=True)


def _compare_at(
    labelled_patients: int, scores: pd.DataFrame, methods: tuple[Method, ...], data: StudyData
) -> pd.DataFrame:
    volumes = _volumes_by_title(labelled_patients, scores, methods, data)
    rows = []
    for a, b in combinations(volumes, 2):
        differences = _by_patient(100 * (volumes[a] - volumes[b]).dropna(), data)
        if len(differences):
            rows.append((labelled_patients, a, b, len(differences), differences.mean(), _p_value(differences)))
    table = pd.DataFrame(rows, columns=_COLUMNS[:-1])
    return table.assign(p_adjusted=_holm(table["p"].to_numpy(dtype=float)))


def _volumes_by_title(
    labelled_patients: int, scores: pd.DataFrame, methods: tuple[Method, ...], data: StudyData
) -> pd.DataFrame:
    """Average Dice over classes: a row for each split and case, a column for each method with that number or 0."""
    taking_part = scores[scores["labelled_patients"].isin([0, labelled_patients])]
    by_volume = taking_part.groupby(["split", "case", "method", "labelled_patients"])["dice"].mean()
    by_volume = by_volume.unstack(["method", "labelled_patients"])
    trained = set(scores.loc[scores["labelled_patients"] > 0, "method"])
    columns = {}
    for method in methods:
        for count in sorted({0, labelled_patients}):
            if (method.key, count) in by_volume:
                untrained = f", 0 {data.counts}" if count == 0 and method.key in trained else ""
                columns[method.title + untrained] = by_volume[(method.key, count)]
    return pd.DataFrame(columns)


def _by_patient(volumes: pd.Series, data: StudyData) -> pd.Series:
    """Average over splits and over the frames of each patient, or the cases of each group."""
    patients = volumes.index.get_level_values("case").map(data.group_of)
    return volumes.groupby(patients).mean()


def _p_value(differences: pd.Series) -> float:
    """Return the two-sided p; 1 if all differences are 0, for which the test is undefined."""
    return float(wilcoxon(differences).pvalue) if differences.any() else 1.0


def _holm(p: np.ndarray) -> np.ndarray:
    """Adjust the p of N tests: the smallest times N, the next times N - 1 and so on, made monotonic, at most 1."""
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def _format_p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"
