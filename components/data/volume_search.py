"""The volumes or pictures of a folder to be segmented, and a dataset that loads them one by one."""

import functools
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import Dataset

from components.base.errors import error_message, is_out_of_memory
from components.base.volume_metadata import (
    CASE,
    DEAD_LINK,
    FRAME,
    FRAMES,
    ITK_SUFFIXES,
    NO_WEBP,
    PICTURE_SUFFIXES,
    VOLUME_SUFFIXES,
    case_name,
    is_dead_link,
    is_picture,
    is_volume,
    other_of_pair,
    time_axis,
    volume_suffix,
    with_case_names,
)
from components.data.prediction_writer import PREDICTION_POSTFIX
from components.data.volume_list import read_volume_list
from components.dicom.images import is_dicom, is_named_dicom
from components.dicom.stack import DicomStack, read_stack, study_folders

logger = logging.getLogger(__name__)

MOST_LABELS = 64  # whole values of a label map, of which one fills more than half
LIST_SUFFIX = ".csv"
FAILURE = "failure"  # key of the reason in the item of a volume that could not be loaded

_IMAGES = re.compile("(images?|imgs?)(tr|ts|val)?")
_LABELS_OF_SUBSET = re.compile("labels?(tr|ts|val)")  # as nnU-Net and the Medical Segmentation Decathlon name them
_LABELS = re.compile("labels?|masks?|seg(mentation)?s?|gts?")
_LABEL_OR_PREDICTION = re.compile(
    rf"(.*[._-])?(gts?|labels?|masks?|d?seg(mentation)?s?|roi|{PREDICTION_POSTFIX})|label[_-].*"
)  # names of files without their suffix


class FoundVolumes(list):
    """The volumes of a folder as a data list, with the files that are left out.

    Args:
        volumes: dictionaries with the path of a volume as `image`. Some have a name as `CASE`; a frame also has `frame`
            and `frames`. See `find_volumes`.
        skipped: reason for each image file or folder that is left out, by path relative to the folder.
    """

    def __init__(self, volumes: list[dict[str, Any]], skipped: dict[str, str]) -> None:
        super().__init__(volumes)
        self.skipped = skipped


def find_volumes(dataset_dir: str, *, pictures: bool = False) -> FoundVolumes:
    """List the volumes, or the 2D pictures, to segment.

    A folder is searched with all folders below it, each once; links are followed. Suffixes are those of
    `VOLUME_SUFFIXES`, in any case; a pair `.hdr` and `.img` is one volume. Damaged files and dead links stay in the
    list, so that the loader reports them.

    Every frame of a series, a 4D file such as a cine, is listed. Every frame of a DICOM study's short-axis cine is
    listed too. Its path is the outermost folder that holds only this study; see `read_stack`. DICOM files are left out
    if there are volumes, which were often made from them.

    These files and folders are left out, with the reason in `skipped`:

    - files without a 3D volume or a series of them, WebP pictures, and further paths to the same file;
    - damaged DICOM files, and DICOM series that are not of the cine;
    - labels and predictions by their name, such as `*_gt`, `*-label`, `*.seg`, `*_dseg`, `*_roi`, `mask`, `label_*`;
    - label maps by their content, up to 64 whole values of which one fills more than half;
    - folders `labelsTr`, `labelsTs` and `labelsVal`, and folders such as `labels`, `masks` or `segmentations` beside
      volumes or a folder such as `images`.

    Hidden files and folders, and files without an image's suffix, are left out without a reason.

    Args:
        dataset_dir: a volume's file, or a folder of volumes or DICOM studies. The file is listed even if it looks like
            a label map, with a warning. Or a CSV file with the columns `id` and `path`, see `read_volume_list`; an id
            is the name of its case. Missing files stay in the list, so that the loader reports them.
        pictures: whether to list files of `PICTURE_SUFFIXES` instead of volumes.

    Returns:
        one dictionary per volume with its path as `image`, sorted by path. Where its file's name is not unique, it also
        has a name as `CASE`; see `case_names`. A frame also has its index as `frame` and the number of frames as
        `frames`.

    Raises:
        ValueError: if `dataset_dir` is empty or has no volume, or two cases would have the same name. If the file is a
            picture but volumes are expected, or the reverse. If a list is wrong.
        FileNotFoundError: if the file or folder is missing.
        OptionalImportError: if there are DICOM files only and pydicom is missing.
    """
    if not dataset_dir:
        raise ValueError(
            "dataset_dir is not set: expected a volume's file or a folder of them; give --dataset_dir PATH"
        )
    root = Path(dataset_dir)
    if is_dead_link(root):
        raise FileNotFoundError(f"dataset_dir {root} is {DEAD_LINK}")
    if not root.exists():
        raise FileNotFoundError(f"dataset_dir {root} does not exist: expected a volume's file or a folder of them")
    if root.suffix.lower() == LIST_SUFFIX and root.is_file():
        return _listed(root, pictures)
    if root.is_file():
        if root.suffix.lower() == ".webp":
            raise ValueError(f"{root} is {NO_WEBP}")
        if is_picture(root) != pictures:
            expected = f"a picture {', '.join(PICTURE_SUFFIXES)}" if pictures else "a volume"
            raise ValueError(
                f"{root} is {'no' if pictures else 'a'} picture: expected {expected}, on which the model was trained"
            )
        if not pictures and (reason := _reason_for_label(root)):
            logger.warning("%s is segmented, though it is %s", root, reason)
        return FoundVolumes(_frames_of(root), {})
    left_out: dict[Path, str] = {}
    volumes: dict[tuple[str, str], Path] = {}  # by case name and real path
    of_studies: list[Path] = []
    for path in _files_below(root, left_out, set()):
        if not pictures and not volume_suffix(path) and (is_dicom(path) or is_named_dicom(path)):
            of_studies.append(path)
        elif pictures and path.suffix.lower() == ".webp":
            left_out[path] = NO_WEBP
        elif reason := _reason_to_skip(path):
            left_out[path] = reason
        elif is_picture(path) if pictures else volume_suffix(path) not in ("", ".img"):  # the .hdr represents the pair
            first = volumes.setdefault((case_name(path), os.path.realpath(path)), path)
            if first != path:
                left_out[path] = f"the same file as {first.relative_to(root)}"
    if volumes:
        left_out |= {
            path.parent: "DICOM files beside volumes: give this folder alone to segment them" for path in of_studies
        }
        of_studies = []
    skipped = {str(path.relative_to(root)): reason for path, reason in left_out.items()}
    found = sorted(volumes.values())
    if of_studies:
        above = Path(os.path.abspath(root))  # noqa: PTH100  # symbolic links stay in the path
        found, outside = study_folders([above / path.relative_to(root) for path in of_studies], above)
        skipped |= {str(path.relative_to(above)): reason for path, reason in outside.items()}
        for folder in found:
            skipped |= _left_out_of(folder)
    if not found:
        raise ValueError(
            f"no {'picture' if pictures else 'volume'} found under {root}: expected "
            f"{'2D' if pictures else '3D'} files {', '.join(PICTURE_SUFFIXES if pictures else VOLUME_SUFFIXES)}"
            f"{'' if pictures else ', or DICOM'}; "
            f"left out: {_in_words(skipped) or 'nothing'}"
        )
    return FoundVolumes(with_case_names([item for path in found for item in _frames_of(path)]), skipped)


def _listed(file: Path, pictures: bool) -> FoundVolumes:
    """Return the volumes of a CSV file, each under its id."""
    listed = read_volume_list(file)
    if wrong := [path for path in listed.values() if is_picture(path) != pictures and not path.is_dir()]:
        raise ValueError(
            f"{file} lists {wrong[0]}: expected {'pictures' if pictures else 'volumes'}, on which the model was trained"
        )
    return FoundVolumes([item | {CASE: case} for case, path in listed.items() for item in _frames_of(path)], {})


def _files_below(folder: Path, left_out: dict[Path, str], searched: set[Path]) -> Iterator[Path]:
    """Yield the files of a folder and of those below it, except hidden ones and those in label folders."""
    real = folder.resolve()
    if real in searched:  # a link back, or a second link to the same folder
        return
    searched.add(real)
    try:
        paths = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    except OSError as error:
        left_out[folder] = f"a folder that cannot be listed: {error.strerror}"
        return
    folders = {path for path in paths if path.is_dir()}
    has_images = any(
        _IMAGES.fullmatch(path.name.lower()) if path in folders else bool(volume_suffix(path)) for path in paths
    )
    for path in paths:
        name = path.name.lower()
        if path not in folders:
            yield path
        elif _LABELS_OF_SUBSET.fullmatch(name) or (has_images and _LABELS.fullmatch(name)):
            left_out[path] = "a folder of labels"
        else:
            yield from _files_below(path, left_out, searched)


def _in_words(skipped: Mapping[str, str]) -> str:
    """Return the first five reasons, each after the first path that it is of, and how many more it is of."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for path, reason in skipped.items():
        by_reason[reason].append(path)
    return "; ".join(
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {reason}"
        for reason, paths in list(by_reason.items())[:5]
    )


def _reason_to_skip(path: Path) -> str:
    """Return why a file is left out, or an empty string; damaged files stay, so that the loader reports them."""
    suffix = volume_suffix(path)
    if not suffix and not is_picture(path):
        return DEAD_LINK if is_dead_link(path) and not path.suffix else ""  # it may have led to a patient's folder
    if reason := _reason_for_label(path):
        return reason
    if (other := other_of_pair(path)) and not os.path.lexists(other):
        return f"half of a pair: there is no {other.name} beside it"
    image = None if suffix == ".img" else _header_of(path)  # a pair is judged by its .hdr
    if image is None:
        return ""
    if image.get_data_dtype().fields:
        return "colours instead of grey values"
    is_fit = is_volume(image.shape) or time_axis(image.shape) is not None
    return "" if is_fit else f"neither a 3D volume nor a series of them but an array {image.shape}"


def _reason_for_label(path: Path) -> str:
    """Return why a file is taken for a label map or a prediction, or an empty string."""
    if _LABEL_OR_PREDICTION.fullmatch(case_name(path).lower()):
        return "a label or prediction by its name"
    image = None if is_picture(path) or path.suffix.lower() == ".img" else _header_of(path)
    if image is None or image.get_data_dtype().fields or len(image.shape) < 3:
        return ""
    try:
        middle = np.asanyarray(image.dataobj[..., image.shape[-1] // 2])  # most images are told by it
        looks_so = _has_few_values(middle) and _looks_like_labels(np.asanyarray(image.dataobj))
    except Exception:  # damaged voxels, which the loader reports
        return ""
    return f"a label map by its content, up to {MOST_LABELS} whole values" if looks_so else ""


def _has_few_values(voxels: np.ndarray) -> bool:
    found = np.unique(voxels)
    return len(found) <= MOST_LABELS and bool(np.equal(found, np.round(found)).all())


def _looks_like_labels(voxels: np.ndarray) -> bool:
    found, counts = np.unique(voxels, return_counts=True)
    return 2 <= len(found) <= MOST_LABELS and _has_few_values(found) and 2 * counts.max() > voxels.size


def _frames_of(path: Path) -> list[dict[str, Any]]:
    """Return the items of a file: one for each frame of a series, else one, also if the loader will reject it."""
    if path.is_dir():
        stack = _stack_of(path)
        frames = stack.shape[-1] if stack else 0
        return [{"image": str(path), FRAME: n, FRAMES: frames} for n in range(frames)] or [{"image": str(path)}]
    image = _header_of(path)
    time = time_axis(image.shape) if image else None
    if time is None:
        return [{"image": str(path)}]
    frames = image.shape[time]
    if image.shape[0] == 1:
        logger.info(
            "%s: the array %s is read as %d frames of (1, H, W), since NIfTI's fourth axis is time; if it is a volume "
            "behind an axis of channels, save it as (H, W, D)",
            path,
            image.shape,
            frames,
        )
    return [{"image": str(path), FRAME: frame, FRAMES: frames} for frame in range(frames)]


def _stack_of(folder: Path) -> DicomStack | None:
    """Return the short-axis cine of a DICOM study; None if there is none, which the loader reports."""
    try:
        return read_stack(folder)
    except ValueError:
        return None


def _left_out_of(folder: Path) -> dict[str, str]:
    """Return why a DICOM study's other series and files are left out; log which series are read."""
    stack = _stack_of(folder)
    if stack is None:
        return {}
    logger.info("%s: the short-axis cine is %s", folder, stack.chosen)
    return {f"{folder.name}, {name}": reason for name, reason in stack.left_out.items()}


def _header_of(path: Path) -> Any:
    """Return nibabel's image of a file without its voxels; None for pictures, ITK's formats and damaged files."""
    if volume_suffix(path) in ("", *ITK_SUFFIXES):
        return None
    try:
        return nib.load(path)
    except Exception:  # nibabel raises many types of errors on damaged headers
        return None


class VolumeDataset(Dataset):
    """MONAI's `Dataset` of volumes that goes on after a volume that cannot be loaded.

    The item of such a volume has the reason as `failure`, which `SegmentationEvaluator` reports. The error is raised if
    there is one file only, or memory is lacking.

    Args: as `Dataset`; `data` has paths as `image`, and the files that `find_volumes` left out as `skipped`.
    """

    @property
    def skipped(self) -> Mapping[str, str]:
        """Reasons for the files that the search left out, by path."""
        return getattr(self.data, "skipped", {})

    @functools.cached_property
    def files(self) -> int:
        """Number of files that hold the volumes and frames."""
        return len({str(item["image"]) for item in self.data})

    def _transform(self, index: int) -> Any:
        item = self.data[index]
        try:
            return super()._transform(index)
        except Exception as error:
            if self.files == 1 or is_out_of_memory(error):
                raise
            logger.debug("%s cannot be loaded", item["image"], exc_info=True)
            return {**item, "image": str(item["image"]), FAILURE: error_message(error)}
