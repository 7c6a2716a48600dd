"""The data set of a study: ACDC, or a user's own data, for which `autosam new` has made the bundles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from components.data.acdc import patient_of
from components.data.cases import SUBSETS, groups_of_cases
from components.data.custom_data import read_data

OWN_COUNTS = "cases"  # name of the labelled ones of a user's own data
_MUST_AGREE = ("dataset_dir", "class_names", "label_values", *SUBSETS)  # between bundles of one study


@dataclass(frozen=True)
class StudyData:
    """The data set of a study, and the words for it in the report.

    Args:
        title: title of the report.
        counts: word for its labelled cases, `patients` or `cases`; a case is a `group` of images, if `data.json` has
            groups.
        item: word for one image, `volume` or `picture`.
        element: word for an element of an image, `voxel` or `pixel`.
        length: unit of distances, `mm` or `pixels`.
        groups: group of each case of a user's own data; None for ACDC.
    """

    title: str = "Adapting SAM to cardiac MR"
    counts: str = "patients"
    item: str = "volume"
    element: str = "voxel"
    length: str = "mm"
    groups: Mapping[str, str] | None = None

    @property
    def is_own(self) -> bool:
        """Whether the data are a user's own."""
        return self.groups is not None

    @property
    def column(self) -> str:
        """The column of `scores.csv` with the number of labelled cases."""
        return f"labelled_{self.counts}"

    @property
    def seen(self) -> str:
        """Word for a network's input images, in the plural."""
        return "slices" if self.item == "volume" else "pictures"

    @property
    def labelled(self) -> str:
        """Words for the number of labelled cases in tables and figures."""
        return f"labelled {self.counts}"

    def group_of(self, case: str) -> str:
        """Return the patient or the group of a case, by the case's name."""
        return patient_of(case) if self.groups is None else self.groups[case]


ACDC = StudyData()


def own_study_data(file: Path) -> StudyData:
    """Describe a user's own data.

    Args:
        file: `data.json` of a bundle.

    Raises:
        ValueError: if a field is missing, or two cases have the same name.
    """
    title, data = f"Study of {file.parents[1].name}", read_data(file)
    groups = groups_of_cases(data)
    if data["pictures"]:
        return StudyData(title, OWN_COUNTS, "picture", "pixel", "pixels", groups)
    return StudyData(title, OWN_COUNTS, groups=groups)


def differences(file: Path, other: Path) -> list[str]:
    """List the keys in which the `data.json` of two bundles describe different data; none if they agree."""
    one, two = read_data(file), read_data(other)
    return [name for name in _MUST_AGREE if one[name] != two[name]]
