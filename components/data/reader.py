"""Reading of volumes by the content of their files, with the geometry of their headers in millimetres."""

import functools
import gzip
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import nibabel as nib
import numpy as np
from monai.config import PathLike
from monai.data import ImageReader, ITKReader
from monai.data.utils import affine_to_spacing
from monai.utils import MetaKeys, OptionalImportError, SpaceKeys, ensure_tuple

from components.base.volume_metadata import (
    FRAME,
    FRAMES,
    ITK_SUFFIXES,
    NO_WEBP,
    is_volume,
    other_of_pair,
    time_axis,
    volume_suffix,
)
from components.dicom.images import begins_like_dicom, body_of
from components.dicom.stack import read_stack, read_voxels

logger = logging.getLogger(__name__)

# Keys of a volume's metadata: its file's NIfTI header as bytes, and the shape of its array as stored.
NIFTI_HEADER = "nifti_header"
STORED_SHAPE = "stored_shape"
HEIGHT_CM, WEIGHT_KG = "height_cm", "weight_kg"  # of the patient; nan if unknown
FRAME_SECONDS = "frame_seconds"  # from one frame to the next; nan if the header has no unit of time
UNIT_MM = "unit_mm"  # the unit of its file's lengths; nan if the header has none, which is read as mm

_MM_PER_UNIT = {1: 1000.0, 2: 1.0, 3: 0.001}  # NIfTI's codes: metre, millimetre, micrometre
_SECONDS_PER_UNIT = {8: 1.0, 16: 1e-3, 24: 1e-6}  # likewise: second, millisecond, microsecond
_CONTRADICTION = 1e-3  # relative difference beyond which two voxel sizes of one header contradict each other
_GZIP = b"\x1f\x8b"
_OTHER_FORMATS = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"II*\0": "a TIFF picture",
    b"MM\0*": "a TIFF picture",
    b"NRRD": "an NRRD file: name it .nrrd",
    b"ObjectType": "a MetaImage file: name it .mha",
    b"PK\x03\x04": "a ZIP archive",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"version https://git-lfs": "the pointer of a file that Git LFS has not fetched",
    b"/annex/objects": "the pointer of a file that git-annex has not fetched",
}


class _Opened(NamedTuple):
    """The content of a file: its array as stored, its affine in mm, and its NIfTI header as bytes, if it has one."""

    path: Path
    array: np.ndarray
    affine_mm: np.ndarray
    unit_mm: float
    header: bytes | None
    body: tuple[float, float] = (float("nan"), float("nan"))  # height in cm, weight in kg


class ContentReader(ImageReader):
    """A reader that recognises files by their content, whatever their names."""

    def verify_suffix(self, _: Sequence[PathLike] | PathLike) -> bool:
        """Accept any name, since the content decides."""
        return True


class VolumeReader(ContentReader):
    """Read one 3D volume, or one frame of a series, as float64 (H, W, D), with its affine in mm.

    NIfTI-1, NIfTI-2 and Analyze are recognised by content, compressed or not, and nibabel's other formats by name.
    `.mha`, `.mhd`, `.nrrd` and `.nhdr` are read by MONAI's `ITKReader`, which needs the package `itk-io`. A folder is
    read as a DICOM study with a short-axis cine; see `read_stack`.

    The affine is the header's sform if its code is set, else its qform, else its voxel sizes. A form that is not an
    affine, such as one with a row of zeros, counts as not set. Differs: MONAI's reader changes a voxel size that
    contradicts the affine; here both stay and a warning names them. Complex values are read as magnitudes. The
    first three axes are those of the volume. Later ones of length 1 are dropped, and one that is longer is time. The
    metadata keep what a prediction needs to get the same header.

    Args:
        frame: index of the frame of a series, whose file is cached for the next frame; None for a volume.
    """

    def __init__(self, frame: int | None = None) -> None:
        super().__init__()
        self.frame = frame

    def read(self, data: Sequence[PathLike] | PathLike, **_: Any) -> Any:
        """Read a file.

        Args:
            data: one path.
            _: MONAI's options for readers, ignored.

        Returns:
            what `get_data` takes.

        Raises:
            ValueError: if the file has an unknown format, no geometry or colours, or is damaged.
            OptionalImportError: if the format needs `itk-io`, which is not installed.
        """
        (path,) = (Path(name) for name in ensure_tuple(data))
        if path.is_dir():
            return _read_study(path, path.stat().st_mtime_ns)
        if self.frame is not None:
            return _read_series(path, path.stat().st_mtime_ns)
        return _read_with_itk(path) if volume_suffix(path) in ITK_SUFFIXES else _read_nifti(path)

    def get_data(self, img: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the volume and its metadata.

        Args:
            img: as `read` returns it.

        Returns:
            float64 (H, W, D), and metadata with keys of MONAI's readers and this module's.

        Raises:
            ValueError: if the array is not a 3D volume, or not a series with the frame.
        """
        shape, array, of_series = img.array.shape, img.array, {}
        if self.frame is not None:
            time = time_axis(shape)
            if time is None or self.frame >= shape[time]:
                raise ValueError(
                    f"{img.path} has no frame {self.frame}: expected (H, W, D, T) with T > {self.frame}, "
                    f"received {shape}; was the file changed after its frames were counted?"
                )
            array = np.moveaxis(array, time, -1)[..., self.frame]  # `take` would copy the whole series
            seconds = _frame_seconds(img.header)
            of_series = {FRAME: self.frame, FRAMES: shape[time], FRAME_SECONDS: seconds}
        elif not is_volume(shape):
            is_one_hot = img.array.ndim == 4 and np.isin(img.array, (0, 1)).all()
            remedy = "give the argmax of one-hot labels" if is_one_hot else "give single frames of a series"
            raise ValueError(f"{img.path} is not one 3D volume: expected (H, W, D), received {shape}; {remedy}")
        volume = np.abs(array) if np.iscomplexobj(array) else array
        metadata = {
            MetaKeys.AFFINE: img.affine_mm.copy(),
            MetaKeys.ORIGINAL_AFFINE: img.affine_mm.copy(),
            MetaKeys.SPATIAL_SHAPE: np.asarray(shape[:3]),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan"),
            STORED_SHAPE: np.asarray(shape),
            UNIT_MM: img.unit_mm,
            HEIGHT_CM: img.body[0],
            WEIGHT_KG: img.body[1],
            **of_series,
        }
        if img.header is not None:
            metadata[NIFTI_HEADER] = np.frombuffer(img.header, np.uint8).copy()
        return volume.reshape(shape[:3]).astype(np.float64), metadata


def _read_nifti(path: Path) -> _Opened:
    """Read a NIfTI or Analyze file."""
    image, header = _open_nifti(path)
    colours = image.get_data_dtype().names
    if colours:
        raise ValueError(
            f"{path} is a colour image ({', '.join(colours)} in each voxel): expected one grey value; convert it to "
            "grey, or give the volume that it was made from"
        )
    try:
        array = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _damaged(path, error) from error
    # NIfTI-2's header is a subclass of NIfTI-1's; Analyze has voxel sizes only
    if not isinstance(image.header, nib.Nifti1Header):
        return _Opened(path, array, np.asarray(image.affine, np.float64), np.nan, None)
    unit_mm = _MM_PER_UNIT.get(int(image.header["xyzt_units"]) & 7, np.nan)
    affine = scaled(_affine(image.header, path), np.nan_to_num(unit_mm, nan=1.0))
    return _Opened(path, array, affine, unit_mm, header)


@functools.lru_cache(maxsize=2)  # a cine and its labels
def _read_series(path: Path, _changed_ns: int) -> _Opened:
    """Read a series and cache it for its other frames; a file that has changed is read again."""
    return _read_nifti(path)


@functools.lru_cache(maxsize=1)
def _read_study(folder: Path, _changed_ns: int) -> _Opened:
    """Read the short-axis cine of a DICOM study as if it were a NIfTI file."""
    stack = read_stack(folder)
    header = nib.Nifti1Header()
    header.set_data_shape(stack.shape)
    header.set_sform(stack.affine, code="scanner")
    header.set_qform(stack.affine, code="scanner")
    is_timed = not np.isnan(stack.frame_seconds)
    header.set_xyzt_units("mm", "sec" if is_timed else None)
    if is_timed:
        header["pixdim"][4] = stack.frame_seconds
    return _Opened(folder, read_voxels(stack), stack.affine, 1.0, header.binaryblock, body_of(stack.slices[0][0].path))


def _frame_seconds(header: bytes | None) -> float:
    """Return the time from frame to frame according to a NIfTI header, or nan."""
    if header is None:
        return float("nan")
    kind = nib.Nifti1Header if len(header) == nib.Nifti1Header.sizeof_hdr else nib.Nifti2Header
    fields = kind(header, check=False)
    return float(fields["pixdim"][4]) * _SECONDS_PER_UNIT.get(int(fields["xyzt_units"]) & 56, float("nan"))


def _open_nifti(path: Path) -> tuple[Any, bytes]:
    """Return nibabel's image of a file, and the bytes of its header before nibabel repairs any."""
    of_pair = path.suffix.lower() == ".img"
    content = _header_beside(path).read_bytes() if of_pair else path.read_bytes()
    if content.startswith(_GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path, error) from error
    for image_class in (nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair, nib.AnalyzeImage):
        size = image_class.header_class.sizeof_hdr
        if not image_class.header_class.may_contain_header(content[:size]):
            continue
        try:
            of_pair = of_pair or image_class is nib.AnalyzeImage or b"ni1" in content[344:347] or b"ni2" in content[4:7]
            return nib.load(path) if of_pair else image_class.from_bytes(content), content[:size]  # type: ignore
        except Exception as error:  # nibabel raises many types of errors on damaged headers
            raise _damaged(path, error) from error
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        raise ValueError(f"{path} is {NO_WEBP}")
    try:
        image = nib.load(path)  # FreeSurfer's .mgz and others that nibabel knows
    except nib.filebasedimages.ImageFileError as error:
        kind = _kind_of(content)
        raise ValueError(f"{path} is not a NIfTI file but {kind}: expected a volume as .nii.gz or .nii") from error
    return image, image.header.binaryblock  # type: ignore[attr-defined]


def _header_beside(path: Path) -> Path:
    """Return the `.hdr` that belongs to an `.img`."""
    header = cast(Path, other_of_pair(path))
    if not header.is_file():
        raise ValueError(f"{path} has no header: expected {header.name} beside it; copy both files")
    return header


def _kind_of(content: bytes) -> str:
    """Describe a file that is not NIfTI."""
    if not content:
        return "empty"
    if begins_like_dicom(content):
        return "a DICOM file: give the folder of its study, whose short-axis cine is read"
    known = (kind for start, kind in _OTHER_FORMATS.items() if content.startswith(start))
    return next(known, f"something that begins with {content[:8]!r}")


def _damaged(path: Path, error: Exception, kind: str = "NIfTI") -> ValueError:
    return ValueError(
        f"{path} cannot be read: expected a complete {kind} file, this one is cut off or damaged ({error})"
    )


def scaled(affine: np.ndarray, factor: float) -> np.ndarray:
    """Return a 4x4 affine in another unit of length."""
    return np.diag([factor, factor, factor, 1.0]) @ affine


def _affine(header: Any, path: Path) -> np.ndarray:
    """Return the affine of a NIfTI header in its own unit, and warn if the header gives two voxel sizes."""
    name, affine = "voxel sizes", header.get_base_affine()
    for form, get in (("sform", header.get_sform), ("qform", header.get_qform)):
        try:
            matrix = get(coded=True)[0]
        except ValueError:  # an invalid quaternion
            matrix = np.full((4, 4), np.nan)
        if matrix is not None and _is_affine(matrix):
            name, affine = form, matrix
            break
        if matrix is not None:
            logger.warning("%s: the %s of its header is not an affine and counts as not set", path, form)
    if not _is_affine(affine):
        raise ValueError(
            f"{path} has no geometry: expected a header whose sform, qform or voxel sizes make an affine, received "
            f"voxel sizes {header.get_zooms()[:3]}; set them"
        )
    sizes, of_header = affine_to_spacing(affine, r=3), np.asarray(header["pixdim"][1:4], np.float64)
    if not np.allclose(sizes, of_header, rtol=_CONTRADICTION, atol=0):
        logger.warning(
            "%s: its header gives two voxel sizes, %s by the %s and %s by pixdim: that of the %s is used",
            path,
            _sizes(sizes),
            name,
            _sizes(of_header),
            name,
        )
    return affine


def _is_affine(matrix: np.ndarray) -> bool:
    """Return whether a 4x4 matrix is finite and its three axes span space."""
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    return bool(np.isfinite(matrix).all() and lengths.all()) and abs(np.linalg.det(matrix[:3, :3] / lengths)) > 1e-3


def _sizes(values: np.ndarray) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _read_with_itk(path: Path) -> _Opened:
    """Read a MetaImage or NRRD file."""
    try:
        reader = ITKReader()
    except OptionalImportError as error:
        raise OptionalImportError(
            f"{path} needs the package itk-io to be read: `pip install itk-io`, or convert the volume to .nii.gz"
        ) from error
    try:
        array, metadata = reader.get_data(reader.read(path))
    except Exception as error:  # itk raises RuntimeError for everything
        raise _damaged(path, error, path.suffix) from error
    return _Opened(path, array, np.asarray(metadata[MetaKeys.AFFINE], np.float64), 1.0, None)
