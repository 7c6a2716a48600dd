"""The numbers of the paper's tables 1 to 3 on ACDC, as printed.

Source: Hu, Xu and Shi, "How to Efficiently Adapt Large Segmentation Model (SAM) to Medical Images", 2023,
arXiv 2306.13731. Mean and standard deviation over four random splits, with 15 test patients each. The paper does not
name these patients, so a study's test patients differ.

The paper's ASSD is not the average symmetric surface distance. Its authors' code computes the 95th percentile of the
Hausdorff distance in pixels of a 224x224 grid. A class without any predicted pixel counts as 0. These scores cannot be
compared with a distance in mm.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_HALF_UP, Decimal
from typing import NamedTuple


class MeanStd(NamedTuple):
    """A mean and the standard deviation over splits."""

    mean: float
    std: float

    def as_text(self, decimals: int) -> str:
        """Format as in the tables, such as `39.3 ± 12.8`."""
        return f"{round_half_up(self.mean, decimals)} ± {round_half_up(self.std, decimals)}"


class PublishedScores(NamedTuple):
    """A row of the paper's table 1: Dice in percent of each class and on average; its "ASSD", None if not reported."""

    rv: MeanStd
    myo: MeanStd
    lv: MeanStd
    mean: MeanStd
    assd: MeanStd | None


class PublishedVariant(NamedTuple):
    """One value of an ablation: average Dice in percent, and the paper's "ASSD", None if not reported."""

    dice: float
    assd: float | None = None


def round_half_up(number: float, decimals: int) -> str:
    """Round half up in decimal, so that 2.05 gives 2.1 although its float is slightly less."""
    return str(Decimal(str(number)).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP))


def _scores(*numbers: float) -> PublishedScores:
    """Pair up means and standard deviations, given in the order of the paper's columns."""
    rv, myo, lv, mean, *assd = (MeanStd(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True))
    return PublishedScores(rv, myo, lv, mean, assd[0] if assd else None)


TABLE_1: Mapping[str, Mapping[int, PublishedScores]] = {
    "UNET": {
        1: _scores(13.45, 1.89, 16.24, 4.14, 22.95, 0.47, 17.55, 2.05, 51.55, 6.42),
        5: _scores(40.36, 2.36, 52.23, 3.80, 62.91, 5.58, 51.83, 3.41, 32.28, 1.40),
    },
    "UNET + SimCLR": {
        1: _scores(14.25, 6.52, 19.40, 6.36, 27.54, 9.80, 20.40, 3.95, 33.14, 4.39),
        5: _scores(45.48, 4.65, 58.20, 6.12, 68.95, 3.88, 57.18, 3.20, 28.98, 7.13),
    },
    "Encoder + LN": {
        1: _scores(0.00, 0.00, 20.42, 13.20, 48.40, 22.50, 22.94, 12.32, 49.38, 12.32),
        5: _scores(22.07, 11.2, 37.38, 11.56, 33.69, 27.63, 31.05, 16.14),
    },
    "Encoder + CNN": {
        1: _scores(30.66, 14.28, 39.96, 8.14, 50.55, 13.56, 40.39, 11.90, 38.13, 16.42),
        5: _scores(59.87, 1.86, 62.81, 2.82, 78.96, 2.79, 67.21, 1.32, 25.46, 11.14),
    },
    "AutoSAM (ft all)": {
        1: _scores(17.10, 9.76, 30.05, 7.77, 43.82, 13.91, 30.32, 10.05, 25.93, 1.94),
        5: _scores(22.43, 18.03, 37.08, 13.49, 53.75, 15.08, 37.76, 15.22, 24.44, 9.92),
    },
    "AutoSAM": {
        1: _scores(31.66, 13.26, 33.49, 9.23, 52.83, 16.49, 39.32, 12.82, 23.59, 2.07),
        5: _scores(58.48, 3.90, 62.18, 2.97, 80.58, 1.42, 67.08, 2.56, 17.54, 3.65),
    },
    "SAM (box)": {0: _scores(53.57, 0.86, 39.60, 0.65, 0.00, 0.00, 31.06, 0.41, 7.83, 0.67)},
}
"""Scores by the paper's name of the row and the number of labelled volumes; 0 if nothing is trained."""

ABLATIONS: Mapping[tuple[str, str], Mapping[tuple[str, int], PublishedVariant]] = {
    ("depth", "Encoder + CNN"): {
        ("2", 1): PublishedVariant(31.46),
        ("3", 1): PublishedVariant(34.77),
        ("4", 1): PublishedVariant(40.39),
        ("5", 1): PublishedVariant(37.55),
        ("2", 5): PublishedVariant(59.56),
        ("3", 5): PublishedVariant(62.06),
        ("4", 5): PublishedVariant(67.21),
        ("5", 5): PublishedVariant(65.48),
    },
    ("encoder", "AutoSAM"): {
        ("vit_b", 1): PublishedVariant(39.32, 23.59),
        ("vit_l", 1): PublishedVariant(40.08, 18.00),
        ("vit_h", 1): PublishedVariant(41.58, 18.28),
    },
    ("encoder", "Encoder + CNN"): {
        ("vit_b", 1): PublishedVariant(40.39, 38.13),
        ("vit_l", 1): PublishedVariant(42.80, 33.64),
        ("vit_h", 1): PublishedVariant(45.42, 31.57),
    },
}
"""Tables 2 (`depth` of the CNN head) and 3 (size of the `encoder`): scores by the ablation and the row of table 1, then
by the value and the number of labelled volumes."""


def published_scores(row: str, labelled_patients: int) -> PublishedScores | None:
    """Look up table 1.

    Args:
        row: the paper's name of the row, such as `AutoSAM`.
        labelled_patients: number of labelled patients, with both frames of each, which the paper calls volumes; 0 if
            nothing is trained.

    Returns:
        the paper's scores; None if it reports none for that number.
    """
    return TABLE_1[row].get(labelled_patients)


def published_variant(row: str, ablation: str, value: str, labelled_patients: int) -> PublishedVariant | None:
    """Look up tables 2 and 3, by the row's name in table 1; None if they report nothing."""
    return ABLATIONS.get((ablation, row), {}).get((value, labelled_patients))
