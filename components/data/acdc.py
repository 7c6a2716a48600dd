"""The ACDC release: listing its patients, splitting them, and choosing the labelled ones.

Layout: `<root>/training/patient001/` holds `Info.cfg`, which names the end-diastolic (ED) and end-systolic (ES) frames,
a `patient001_frame<NN>.nii.gz` and `patient001_frame<NN>_gt.nii.gz` for each, and the whole 4D series. Folders and
files may be links, and the volumes may be unpacked (`.nii`).
"""

import codecs
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from components.data.volume_metadata import DEAD_LINK, VOLUME_SUFFIXES, case_name, is_dead_link, volume_suffix

logger = logging.getLogger(__name__)

SUBSETS = ("training", "validation", "test")
CLASS_NAMES = ("RV", "Myo", "LV")  # labels 1, 2 and 3
INFO = "Info.cfg"  # in each patient's folder
LABEL_UNITS = ("patients", "frames")
HELD_OUT_PERCENT = 15  # of the patients for validation, and the same for test (paper section 4.1)

# The 70:10:20 split of the benchmark SSL4MIS, by which semi-supervised methods are compared, in the order of its lists
# data/ACDC/*.list (https://github.com/HiLab-git/SSL4MIS): its first training patients are the labelled ones.
SSL4MIS = "ssl4mis"
_SSL4MIS_NUMBERS = {
    "training": (
        "099 038 050 100 058 021 049 020 072 040 060 089 004 056 098 096 031 018 094 047 048 055 097 074 "
        "043 041 063 037 095 054 026 088 032 069 006 071 012 073 061 017 025 010 057 029 051 005 036 046 "
        "062 034 076 092 070 077 067 003 091 016 014 044 042 090 053 027 035 086 023 009 079 015"
    ),
    "validation": "028 085 082 087 019 030 078 045 002 039",
    "test": "011 013 084 033 093 022 068 024 083 081 080 001 007 066 008 065 075 064 059 052",
}

_OWN_LISTS = "lists of cases of your own: train#dataset#data, validate#dataset#data, and test#data for evaluation"

Case = dict[str, str]  # paths of an `image` and its `label`


def list_cases(
    dataset_dir: str,
    subset: str,
    *,
    split_seed: int | str = 0,
    labelled_patients: int | None = None,
    label_unit: str = "patients",
    include_testing: bool = False,
) -> list[Case]:
    """List image and label of every case of a subset, as a data list for MONAI's datasets.

    Source: paper sections 4.1 and 4.4.

    Args:
        dataset_dir: the release's root or its `training` folder.
        subset: `training`, `validation` or `test`.
        split_seed: seed of the split by patient, 70:15:15, and of the choice of labelled patients; or `ssl4mis`, see
            `split_patients`.
        labelled_patients: how many of the training patients count as labelled, 0 for a training on unlabelled ones;
            None for all. A smaller selection is part of every larger one.
        label_unit: what `labelled_patients` counts: `patients`, with both frames each, or single `frames`.
        include_testing: whether the patients in the release's `testing` folder are split as well.

    Returns:
        dictionaries with the paths `image` and `label`, ED before ES.

    Raises:
        ValueError: for a folder without ACDC's layout, an unknown subset or unit, more labelled patients than the
            training subset has, or a training or test subset without patients.
        FileNotFoundError: for a frame or a label that is missing.
    """
    if subset not in SUBSETS:
        raise ValueError(f"unknown subset {subset!r}: expected one of {', '.join(SUBSETS)}")
    patients = list_patients(dataset_dir, include_testing=include_testing)
    chosen = split_patients(list(patients), split_seed)[subset]
    if not chosen and subset != "validation":
        raise ValueError(f"no patient is left for the {subset} subset of {dataset_dir}: it holds only {len(patients)}")
    if subset != "training" or labelled_patients is None:
        cases = [case for patient in chosen for case in patients[patient]]
    else:
        cases = _choose_labelled(patients, chosen, labelled_patients, label_unit)
    logger.info("%s: %d volumes: %s", subset, len(cases), ", ".join(Path(case["image"]).name for case in cases))
    return cases


def list_unlabelled(
    dataset_dir: str,
    *,
    labelled: Sequence[Case],
    patients: int | None = None,
    split_seed: int | str = 0,
    include_testing: bool = False,
) -> list[Case]:
    """List the images of training patients of whom no case is labelled; their labels on disk are not looked at.

    Args:
        dataset_dir: as for `list_cases`.
        labelled: the labelled cases of the training, which must belong to the same split.
        patients: how many patients to list, the first in the order of the split; None for all.
        split_seed: as for `list_cases`.
        include_testing: as for `list_cases`.

    Returns:
        dictionaries with the path `image`, ED before ES.

    Raises:
        ValueError: as `list_cases`, when a labelled case is of a validation or test patient, or when there are fewer
            such patients than asked for, or none.
        FileNotFoundError: as `list_cases`.
    """
    known = list_patients(dataset_dir, include_testing=include_testing)
    subsets = split_patients(list(known), split_seed)
    labelled_images = {case["image"] for case in labelled}
    with_labels = {name for name, cases in known.items() if labelled_images & {case["image"] for case in cases}}
    for subset in ("validation", "test"):
        if strays := sorted(with_labels.intersection(subsets[subset])):
            raise ValueError(
                f"expected labelled cases of training patients, received {', '.join(strays)} of the {subset} subset of "
                f"split {split_seed}: give the same split_seed and include_testing for both lists"
            )
    left = [name for name in subsets["training"] if name not in with_labels]
    count = len(left) if patients is None else patients
    if not 1 <= count <= len(left):
        raise ValueError(
            f"unlabelled_patients must be between 1 and {len(left)}, the training patients without a label, received "
            f"{count}: label fewer (labelled_patients), or train without the overlay of unlabelled patients"
        )
    cases = [{"image": case["image"]} for name in left[:count] for case in known[name]]
    logger.info("unlabelled: %d volumes: %s", len(cases), ", ".join(Path(case["image"]).name for case in cases))
    return cases


def patient_of(case: str) -> str:
    """Return the patient in the name of a case: `patient001` for `patient001_frame01`."""
    return case.partition("_frame")[0]


def list_patients(dataset_dir: str, *, include_testing: bool = False) -> dict[str, list[Case]]:
    """List the cases of all patients of an ACDC release.

    Args:
        dataset_dir: the release's root or its `training` folder.
        include_testing: whether to list the root's `testing` folder as well.

    Returns:
        the ED and ES case of every patient, by patient name, sorted by name.

    Raises:
        ValueError: when no folder is given, or it has no patients in ACDC's layout.
        FileNotFoundError: when the folder, a frame or a label, or what a link to one leads to is missing.
    """
    if not dataset_dir:
        raise ValueError(
            "dataset_dir is not set: expected the ACDC release's root or its training folder; give --dataset_dir PATH, "
            f"or {_OWN_LISTS}"
        )
    root = Path(dataset_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"dataset_dir {root} is not a folder: expected the ACDC release's root or its training")
    folders = [root / "training"] if (root / "training").is_dir() else [root]
    if include_testing:
        folders.append(folders[0].parent / "testing")
    found = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    patients = sorted((path for path in found if _is_patient(path)), key=lambda path: path.name)
    if not patients:
        raise ValueError(
            f"dataset_dir {root} is not the ACDC release: expected folders patient001, patient002, ... in it or in its "
            f"training folder, found {', '.join(sorted(path.name for path in root.iterdir())[:5]) or 'nothing'}; of "
            f"other data give {_OWN_LISTS}"
        )
    return {patient.name: _list_frames(patient) for patient in patients}


def split_patients(patients: Sequence[str], seed: int | str) -> dict[str, list[str]]:
    """Split patients 70:15:15; validation and test are rounded to the nearest integer, training is the rest.

    Args:
        patients: their names, in a fixed order.
        seed: seed of the shuffle; or `ssl4mis` for the fixed 70:10:20 split of that benchmark.

    Returns:
        the names of each subset, in shuffled order.

    Raises:
        ValueError: for another word, or when `ssl4mis` is asked for patients that are not ACDC's 100.
    """
    if isinstance(seed, str):
        return _ssl4mis_split(patients, seed)
    shuffled = [patients[index] for index in np.random.RandomState(seed).permutation(len(patients))]
    held_out = (HELD_OUT_PERCENT * len(patients) + 50) // 100
    return {
        "validation": shuffled[:held_out],
        "test": shuffled[held_out : 2 * held_out],
        "training": shuffled[2 * held_out :],
    }


def _ssl4mis_split(patients: Sequence[str], name: str) -> dict[str, list[str]]:
    if name != SSL4MIS:
        raise ValueError(f"expected split_seed to be an integer or {SSL4MIS!r}, received {name!r}")
    split = {subset: [f"patient{each}" for each in text.split()] for subset, text in _SSL4MIS_NUMBERS.items()}
    expected = {patient for subset in split.values() for patient in subset}
    if missing := sorted(expected.symmetric_difference(patients)):
        raise ValueError(
            f"the split {SSL4MIS} is of patient001 to patient100, the whole training folder of ACDC: missing or extra "
            f"are {len(missing)}, such as {', '.join(missing[:3])}; complete the folder, leave include_testing False, "
            "or give an integer as split_seed"
        )
    return split


def _choose_labelled(patients: dict[str, list[Case]], training: list[str], count: int, unit: str) -> list[Case]:
    """Return the cases of the first `count` training patients, or the first `count` frames of all of them."""
    if unit not in LABEL_UNITS:
        raise ValueError(f"unknown label_unit {unit!r}: expected one of {', '.join(LABEL_UNITS)}")
    groups = [patients[patient] for patient in training]
    if unit == "frames":
        # First one frame of each patient, alternating between ED and ES, then the others.
        groups = [[cases[(index + turn) % 2]] for turn in range(2) for index, cases in enumerate(groups)]
    if not 0 <= count <= len(groups):
        raise ValueError(
            f"labelled_patients must be between 0 and {len(groups)}, the {unit} of the training subset, "
            f"received {count}"
        )
    return [case for group in groups[:count] for case in group]


def _is_patient(path: Path) -> bool:
    """Return whether a path is a patient's folder, or a link to one."""
    if not re.fullmatch(r"patient\d+", path.name):
        return False
    if is_dead_link(path):  # leaving the patient out would change the split
        raise FileNotFoundError(f"the patient {path} is {DEAD_LINK}")
    return path.is_dir()


def _list_frames(patient: Path) -> list[Case]:
    """Return the ED and ES case in a patient's folder."""
    info = patient / INFO
    if not info.is_file():
        raise ValueError(f"{patient} is not an ACDC patient: expected an Info.cfg that names its ED and ES frames")
    fields = read_info(patient)
    by_name: dict[str, Path] = {}  # of several files of one name the one with the release's suffix, which comes first
    volumes = [path for path in patient.iterdir() if volume_suffix(path)]
    for path in sorted(volumes, key=lambda path: (VOLUME_SUFFIXES.index(volume_suffix(path)), path)):
        by_name.setdefault(case_name(path), path)
    cases = []
    for phase in ("ED", "ES"):
        if not fields.get(phase, "").isdecimal():
            raise ValueError(f"{info} does not name the {phase} frame: expected a line such as `{phase}: 1`")
        stem = f"{patient.name}_frame{int(fields[phase]):02d}"
        for role, name in (("image", stem), ("label", f"{stem}_gt")):
            if name in by_name and is_dead_link(by_name[name]):
                raise FileNotFoundError(f"the {role} {by_name[name]} is {DEAD_LINK}")
            if name not in by_name:
                found = sorted(path.name for path in patient.iterdir() if "frame" in path.name)
                raise FileNotFoundError(
                    f"{patient.name} has no {role} of its {phase} frame: expected {patient / name}.nii.gz, found "
                    f"{', '.join(found) or 'no frames'}; complete the patient or take its folder out of dataset_dir"
                )
        cases.append({"image": str(by_name[stem]), "label": str(by_name[f"{stem}_gt"])})
    return cases


def read_info(patient: Path) -> dict[str, str]:
    """Return what the `Info.cfg` in a patient's folder says: `ED` and `ES`, `Height` in cm, `Weight` in kg and others.

    Raises:
        ValueError: when the file is no text.
    """
    return dict(re.findall(r"^\s*(\w+)\s*:\s*(\S+)", _read_text(patient / INFO), flags=re.MULTILINE))


def _read_text(file: Path) -> str:
    """Read text in UTF-8, in UTF-16 with its mark, or else in Latin-1."""
    content = file.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if "\0" in text:
        raise ValueError(f"{file} is not text in UTF-8, UTF-16 or Latin-1: copy it from the release again")
    return "\n".join(text.splitlines())
