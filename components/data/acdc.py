"""The ACDC release: its layout, patients and `Info.cfg` files.

Layout: `<root>/training/patient001/` holds `Info.cfg`, which names the end-diastolic (ED) and end-systolic (ES) frames,
a `patient001_frame<NN>.nii.gz` and `patient001_frame<NN>_gt.nii.gz` for each, and the whole 4D series. Folders and
files may be links, and the volumes may be unpacked (`.nii`). A folder with an `Info.cfg` may have any other name.
"""

import codecs
import os
import re
from pathlib import Path
from typing import Any

from components.base.volume_metadata import DEAD_LINK, VOLUME_SUFFIXES, case_name, is_dead_link, volume_suffix
from components.data.cases import OWN_LISTS, Case, check_dataset_dir

CLASS_NAMES = ("RV", "Myo", "LV")  # labels 1, 2 and 3
INFO = "Info.cfg"  # in each patient's folder


def read_acdc(dataset_dir: str, include_testing: bool = False) -> dict[str, Any]:
    """Describe an ACDC release as `components.data.read_data` describes a user's own data.

    Args:
        dataset_dir: the release's root or its `training` folder; empty if no case will be listed.
        include_testing: whether to include the patients in the release's `testing` folder.

    Returns:
        the content of a `data.json`, by name. `training` has the ED and ES case of every patient, sorted by patient,
        with the patient's name as `group`. The other lists are empty, so that validation and test are split off.

    Raises:
        ValueError: as `list_patients`, except for an empty `dataset_dir`.
        FileNotFoundError: as `list_patients`.
    """
    patients = list_patients(dataset_dir, include_testing=include_testing) if dataset_dir else {}
    return {
        "dataset_dir": str(dataset_dir),
        "class_names": list(CLASS_NAMES),
        "label_values": list(range(len(CLASS_NAMES) + 1)),
        "channels": 1,
        "pictures": False,
        "modality": "MR",
        "slice_axis": None,
        "turned_views": False,
        "training": [{**case, "group": patient} for patient, cases in patients.items() for case in cases],
        "validation": [],
        "test": [],
        "unlabelled": [],
    }


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
        ValueError: if no folder is given, or it has no patients in ACDC's layout.
        FileNotFoundError: if the folder, a frame, a label or the target of a link is missing.
    """
    check_dataset_dir(dataset_dir)
    root = Path(dataset_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"dataset_dir {root} is not a folder: expected the ACDC release's root or its training")
    folders = [root / "training"] if (root / "training").is_dir() else [root]
    if include_testing:
        folders.append(folders[0].parent / "testing")
    found = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
    patients = sorted((path for path in found if _is_patient(path)), key=lambda path: path.name)
    if not patients:
        found_here = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise ValueError(
            f"dataset_dir {root} is not the ACDC release: expected folders patient001, patient002, ..., or others with "
            f"an {INFO}, in it or in its training folder, found {found_here}; for other data give {OWN_LISTS}"
        )
    return {patient.name: _list_frames(patient) for patient in patients}


def _is_patient(path: Path) -> bool:
    """Return whether a path is a patient's folder, or a link to one."""
    if not re.fullmatch(r"patient\d+", path.name):
        return (path / INFO).is_file()
    if is_dead_link(path):  # leaving the patient out would change the split
        raise FileNotFoundError(f"the patient {path} is {DEAD_LINK}")
    return path.is_dir()


def _list_frames(patient: Path) -> list[Case]:
    """Return the ED and ES case in a patient's folder."""
    info = patient / INFO
    if not info.is_file():
        raise ValueError(f"{patient} is not an ACDC patient: expected an Info.cfg that names its ED and ES frames")
    fields = read_info(patient)
    by_name: dict[str, Path] = {}  # of files with one name, the one with the release's suffix, which is sorted first
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


def frame_of_patient(image: str | os.PathLike[str], name: str) -> int | None:
    """Return which frame of a patient in ACDC's layout an image is.

    Args:
        image: its file, such as `patient001/patient001_frame01.nii.gz` beside an `Info.cfg`.
        name: its case name, which ends in the frame as well unless a list has given it another one.

    Returns:
        the number of the frame, from 1; None for any other image.
    """
    path = Path(image)
    frame = re.fullmatch(rf"{re.escape(path.parent.name)}(_frame(\d+))", case_name(path))
    of_patient = frame is not None and name.endswith(frame[1]) and (path.parent / INFO).is_file()
    return int(frame[2]) if frame and of_patient else None


def read_info(patient: Path) -> dict[str, str]:
    """Return the fields of a patient's `Info.cfg`: `ED`, `ES`, `Height` in cm, `Weight` in kg and others.

    Raises:
        ValueError: if the file is not text.
    """
    return dict(re.findall(r"^\s*(\w+)\s*:\s*(\S+)", _read_text(patient / INFO), flags=re.MULTILINE))


def _read_text(file: Path) -> str:
    """Read text in UTF-8, in UTF-16 with a byte order mark, or else in Latin-1."""
    content = file.read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    if "\0" in text:
        raise ValueError(f"{file} is not text in UTF-8, UTF-16 or Latin-1: copy it from the release again")
    return "\n".join(text.splitlines())
