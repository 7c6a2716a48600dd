"""The split of a data set by group into training, validation and test, and the choice of the labelled cases.

A data set is described by the dictionary that `components.data.read_acdc` and `components.data.read_data` return. Its
lists `training`, `validation`, `test` and `unlabelled` hold cases: dictionaries with the paths `image` and `label`. A
`group` may name what several cases belong to, such as their patient. A case without it is a group of its own. A case
whose file has the name of another one has a name as `CASE`; see `named_cases`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.base.volume_metadata import CASE, case_name_of_item, with_case_names
from components.data.split import shuffled, split_patients

logger = logging.getLogger(__name__)

SUBSETS = ("training", "validation", "test")
LABEL_UNITS = ("cases", "frames")
OWN_LISTS = "your own lists of cases: train#dataset#data, validate#dataset#data, and test#data for evaluation"
_NAMES_LOGGED = 20

Case = dict[str, str]  # paths of an `image` and its `label`, and maybe a `group`


def list_cases(
    data: Mapping[str, Any],
    subset: str,
    *,
    split_seed: int | str = 0,
    labelled_cases: int | None = None,
    label_unit: str = "cases",
) -> list[Case]:
    """List image and label of every case of a subset, as a data list for MONAI's datasets.

    If the data list no validation and no test case, both are split off `training`, 70:15:15, by group.

    Source: paper sections 4.1 and 4.4.

    Args:
        data: as `components.data.read_acdc` or `components.data.read_data` returns it.
        subset: `training`, `validation` or `test`.
        split_seed: seed of the split and of the choice of labelled cases; or `ssl4mis`, see `components.data.split`.
        labelled_cases: number of labelled groups of the training subset, 0 for training on unlabelled ones; None for
            all. A smaller selection is part of every larger one.
        label_unit: what `labelled_cases` counts. `cases` are groups with all their images, such as a patient with both
            frames; `frames` are single images.

    Returns:
        dictionaries with the paths `image` and `label`, and the case's name as `CASE` where its file's name is not
        unique.

    Raises:
        ValueError: if the folder of the data is not set, or the subset or unit is unknown. If too many labelled cases
            are requested, or the training or test subset is empty. If a case has no label or is listed twice, or a
            group is in two lists.
    """
    if subset not in SUBSETS:
        raise ValueError(f"unknown subset {subset!r}: expected one of {', '.join(SUBSETS)}")
    cases = _split(data, split_seed)[subset]
    if not cases and subset != "validation":
        raise ValueError(_nothing_left(data, subset))
    if subset == "training" and labelled_cases is not None:
        cases = _choose_labelled(cases, labelled_cases, label_unit)
    if bare := [case["image"] for case in cases if "label" not in case]:
        raise ValueError(
            f"{bare[0]} has no label in the list `{subset}`: expected one, or the image in the list `unlabelled`"
        )
    _log(data, subset, cases)
    return [{key: case[key] for key in ("image", "label", CASE) if key in case} for case in cases]


def list_unlabelled(
    data: Mapping[str, Any],
    *,
    labelled: Sequence[Mapping[str, str]],
    cases: int | None = None,
    split_seed: int | str = 0,
) -> list[Case]:
    """List the images to learn from without a label; labels on disk are not read.

    The training groups without a labelled case come first, then the list `unlabelled`.

    Args:
        data: as for `list_cases`.
        labelled: the labelled cases of the training, which must belong to the same split.
        cases: number of groups to list, from the first; None for all.
        split_seed: as for `list_cases`.

    Returns:
        dictionaries with the path `image`.

    Raises:
        ValueError: as `list_cases`. If a labelled case belongs to validation or test, or there are fewer such groups
            than requested, or none.
        FileNotFoundError: if an image is missing.
    """
    split = _split(data, split_seed)
    labelled_images = {case["image"] for case in labelled}
    for subset in ("validation", "test"):
        if strays := sorted({_group_of(case) for case in split[subset] if case["image"] in labelled_images}):
            raise ValueError(
                f"expected labelled cases of the training subset, received {', '.join(strays)} of the {subset} subset "
                f"of split {split_seed}: give the same data and split_seed for both lists"
            )
    of_training = _grouped(split["training"]).values()
    without_labels = [group for group in of_training if not labelled_images & {case["image"] for case in group}]
    groups = [*without_labels, *_grouped(split["unlabelled"]).values()]
    count = len(groups) if cases is None else cases
    if not 1 <= count <= len(groups):
        raise ValueError(
            f"unlabelled_cases must be between 1 and {len(groups)}, the training cases without a label and those of "
            f"the list `unlabelled`, received {count}: label fewer (labelled_cases), list more, or train without the "
            "overlay of unlabelled cases"
        )
    found = [{"image": case["image"]} for group in groups[:count] for case in group]
    if gone := [case["image"] for case in found if not Path(case["image"]).is_file()]:
        raise FileNotFoundError(f"the listed image {gone[0]} is missing: add it, or remove it from the list")
    _log(data, "unlabelled", found)
    return found


def groups_of_cases(data: Mapping[str, Any]) -> dict[str, str]:
    """Return the group of every labelled case, such as its patient; by default the case itself.

    Args:
        data: as for `list_cases`.

    Returns:
        groups by case name, as in scores and predictions.
    """
    cases = [(case_name_of_item(case), case) for subset in SUBSETS for case in data[subset]]
    return {name: str(case.get("group", name)) for name, case in cases}


def named_cases(lists: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Give the labelled cases of a data set unique names, so that a case has one name in every split.

    Args:
        lists: cases by subset; those of other lists, such as `unlabelled`, are never scored and have no names.

    Returns:
        the same lists, in which cases have `CASE` where their file's name is not unique.

    Raises:
        ValueError: if two cases have the same name, with the names of their folders too.
    """
    named = iter(with_case_names([case for subset in SUBSETS for case in lists.get(subset, [])]))
    return {**lists} | {name: [next(named) for _ in lists[name]] for name in SUBSETS if name in lists}


def check_dataset_dir(dataset_dir: str) -> None:
    """Raise ValueError if the folder of the data is not set."""
    if not dataset_dir:
        raise ValueError(
            "dataset_dir is not set: expected the folder of the data, for ACDC the release's root or its training "
            f"folder; give --dataset_dir PATH, or {OWN_LISTS}"
        )


def check_no_leakage(lists: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Check that no case is listed twice and no group is in two lists, so that test cases are new to the model.

    Args:
        lists: dictionaries with the path `image`, and a `group` if it has one, by subset.

    Raises:
        ValueError: if so; the message names the image or group, and the lists.
    """
    place: dict[str, str] = {}
    of_group: dict[str, str] = {}
    for name, cases in lists.items():
        for case in cases:
            if (real := os.path.realpath(case["image"])) in place:
                where = "twice in the list" if place[real] == name else f"in the lists `{place[real]}` and"
                raise ValueError(f"{case['image']} is {where} `{name}`: expected it once")
            place[real] = name
            if "group" in case and (other := of_group.setdefault(str(case["group"]), name)) != name:
                raise ValueError(
                    f"the group {case['group']} is in the lists `{other}` and `{name}`: expected all its cases in one"
                )


def _split(data: Mapping[str, Any], seed: int | str) -> dict[str, list[Case]]:
    """Return the cases of each subset and the unlabelled ones; the cases of a training group are adjacent."""
    check_dataset_dir(data["dataset_dir"])
    listed: dict[str, list[Case]] = {name: list(data[name]) for name in (*SUBSETS, "unlabelled")}
    check_no_leakage(listed)
    groups = _grouped(listed["training"])
    if listed["validation"] or listed["test"]:
        if isinstance(seed, str):
            raise ValueError(
                f"expected split_seed to be an integer, since the data list validation or test cases, received {seed!r}"
            )
        split = {"training": shuffled(sorted(groups), seed)}
    else:
        split = split_patients(sorted(groups), seed)
    return listed | {name: [case for group in order for case in groups[group]] for name, order in split.items()}


def _grouped(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Return cases by group, with groups in the order of their first case."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(_group_of(case), []).append(case)
    return groups


def _group_of(case: Mapping[str, str]) -> str:
    return str(case.get("group", case["image"]))


def _choose_labelled(training: Sequence[Case], count: int, unit: str) -> list[Case]:
    """Return the cases of the first `count` groups of the training subset, or its first `count` frames."""
    if unit not in LABEL_UNITS:
        raise ValueError(f"unknown label_unit {unit!r}: expected one of {', '.join(LABEL_UNITS)}")
    groups = list(_grouped(training).values())
    if unit == "frames":
        # First one frame of each group, then the others; in ACDC, ED and ES alternate from patient to patient.
        turns = [(turn, *each) for turn in range(max(map(len, groups))) for each in enumerate(groups)]
        groups = [[cases[(index + turn) % len(cases)]] for turn, index, cases in turns if turn < len(cases)]
    if not 0 <= count <= len(groups):
        raise ValueError(
            f"labelled_cases must be between 0 and {len(groups)}, the {unit} of the training subset, received {count}"
        )
    return [case for group in groups[:count] for case in group]


def _nothing_left(data: Mapping[str, Any], subset: str) -> str:
    """Return the message for a subset without cases."""
    if subset == "training":
        return f"there are no cases to train on in {data['dataset_dir']}: expected some in the list `training`"
    return (
        f"there are no labelled cases to test on in {data['dataset_dir']}: expected a list `test` with labels, or at "
        "least 4 cases or patients in `training` and neither `validation` nor `test`, so that both are split off, "
        f"received {len(_grouped(data['training']))}; validation cases cannot be tested on, since they have chosen the "
        "model"
    )


def _log(data: Mapping[str, Any], subset: str, cases: Sequence[Case]) -> None:
    names = [Path(case["image"]).name for case in cases]
    more = f" and {len(names) - _NAMES_LOGGED} more" if len(names) > _NAMES_LOGGED else ""
    kind = "pictures" if data["pictures"] else "volumes"
    logger.info("%s: %d %s: %s%s", subset, len(names), kind, ", ".join(names[:_NAMES_LOGGED]), more)
