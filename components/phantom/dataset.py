"""Synthetic patients on disk, in the layout of the ACDC release."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from components.phantom.anatomy import AnatomyRanges, anatomy, draw_anatomy
from components.phantom.appearance import AppearanceRanges, draw_appearance, signal
from components.phantom.draws import select

MANIFEST = "phantom.json"
_FORMAT = 3  # increment it whenever the same arguments give other voxels

_SIZES_HW = ((216, 256), (154, 224), (232, 256), (184, 288), (256, 216), (174, 224), (208, 256), (264, 288))
_SPACING_MM = (1.37, 1.68)
_USUAL_SIDE = 256  # pixels for which the spacings above are meant; other sizes keep the field of view
_DESCENT = 0.06  # movement of the base towards the apex from ED to ES, fraction of the heart's length
# columns: directions of the array axes x (right), y (down), z (base to apex); rows: towards the patient's right,
# front and head
_SHORT_AXIS = np.array([[-0.707, 0.354, -0.612], [-0.707, -0.354, 0.612], [0.0, -0.866, -0.5]])


@dataclass(frozen=True)
class _Scan:
    """Properties shared by the files of one synthetic patient."""

    name: str
    size_hw_d: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    levels: np.ndarray  # of the slices at ED
    ed_frame: int
    es_frame: int
    frames: int
    gain: float  # grey value of the blood in the LV
    height_cm: float
    weight_kg: float
    affine: np.ndarray
    frame_seconds: float  # a heart beat over the number of frames


def write_phantom_dataset(
    root: str,
    *,
    patients: int = 10,
    seed: int = 0,
    size_hw_d: tuple[int, int, int] | None = None,
    zoom: float = 1.0,
    series: bool = False,
) -> str:
    """Write synthetic patients in the layout of ACDC, or reuse the folder if the same call has written it before.

    The folder holds `training/patientNNN/` with `Info.cfg`, image and truth of the ED and ES frames, and a manifest.
    It is created in one step, so several processes may call at the same time. A patient depends only on `seed`, its
    number and the size. The second of every five has its ED in frame 4; every third has empty end slices.

    Args:
        root: folder to write; its parents are created.
        patients: number of patients, at least 1.
        seed: 0 or more; the same seed gives the same voxels.
        size_hw_d: shape of the arrays in the order of their axes (x, y, z), at least (16, 16, 2); it varies by default.
        zoom: factor by which the field of view is divided.
        series: whether to write the whole cardiac cycle, too: `patientNNN_4d.nii.gz` with its frame time, and the
            truth of its frames, `patientNNN_4d_gt.nii.gz` (some seconds per patient).

    Returns:
        `root`, as a string.

    Raises:
        ValueError: if an argument is out of range, or the folder was written with other arguments.
        FileExistsError: if the folder holds other files, or files are missing.
    """
    size = None if size_hw_d is None else [int(side) for side in size_hw_d]
    if patients < 1 or seed < 0:
        raise ValueError(f"Expected patients >= 1 and seed >= 0, received patients={patients}, seed={seed}.")
    if size is not None and (len(size) != 3 or min(size[:2]) < 16 or size[2] < 2):
        raise ValueError(f"Expected size_hw_d of three numbers, at least (16, 16, 2), received {size_hw_d}.")
    if not zoom > 0:
        raise ValueError(f"Expected zoom > 0, received {zoom}.")
    content: dict[str, Any] = {"seed": seed, "size_hw_d": size, "zoom": zoom, "series": series}
    arguments = {"format": _FORMAT, "patients": patients, **content}
    target = Path(root)
    if _is_written(target, arguments):
        return str(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for number in range(1, patients + 1):
            _write_patient(staging / "training", number, **content)
        files = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
        (staging / MANIFEST).write_text(json.dumps({"arguments": arguments, "files": files}, indent=2) + "\n")
        staging.chmod(0o755)  # temporary folders are private
        try:
            staging.rename(target)
        except OSError:
            if not _is_written(target, arguments):  # if it is, another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return str(root)


def _is_written(target: Path, arguments: dict) -> bool:
    """Return whether the folder exists and is complete; raise if it holds anything else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    advice = "Name another folder, or remove this one."
    if not (target / MANIFEST).is_file():
        raise FileExistsError(f"Expected {target} to be absent, empty or a phantom dataset with {MANIFEST}. {advice}")
    manifest = json.loads((target / MANIFEST).read_text())
    if manifest["arguments"] != arguments:
        written = manifest["arguments"]
        raise ValueError(f"Expected {target} of {arguments}, received one written with {written}. {advice}")
    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} - {MANIFEST}
    if files != set(manifest["files"]):
        changed = sorted(files ^ set(manifest["files"]))[:5]
        raise FileExistsError(f"Expected {target} as written, received missing or foreign files {changed}. {advice}")
    return True


def _plan_scan(number: int, *, seed: int, size_hw_d: list[int] | None, zoom: float) -> _Scan:
    """Draw a patient's grid, slice levels, frames and position."""
    random = np.random.default_rng([seed, number])
    size_hw = _SIZES_HW[(number - 1 + int(random.integers(2))) % len(_SIZES_HW)]
    thickness = 10.0 if random.random() < 0.7 else 5.0
    depth = int(random.integers(6, 12) if thickness > 5 else random.integers(12, 15))
    spacing = random.uniform(*_SPACING_MM)
    if size_hw_d is not None:
        size_hw, depth = (size_hw_d[0], size_hw_d[1]), size_hw_d[2]
        spacing *= _USUAL_SIDE / max(size_hw)
    spacing_mm = (round(spacing / zoom, 4), round(spacing / zoom, 4), thickness)
    first, last = random.uniform(0.0, 0.06), random.uniform(0.86, 0.97)
    if number % 3 == 0:  # one slice beyond the base, beyond the apex or both
        which = random.integers(1, 4)
        step = 1 / (depth + 1)
        first, last = (-0.6 * step if which & 1 else first), (1 + 0.6 * step if which & 2 else last)
    ed_frame = 4 if number % 5 == 2 else 1
    es_frame = ed_frame + int(random.integers(7, 13))
    turn = Rotation.from_euler("xyz", random.uniform(-15, 15, size=3), degrees=True).as_matrix()
    directions = np.linalg.svd(turn @ _SHORT_AXIS)
    rotation = directions.U @ directions.Vh  # the nearest orthonormal matrix: the constants above are rounded
    shape = (*size_hw, depth)
    affine = np.eye(4)
    affine[:3, :3] = rotation * spacing_mm
    heart = np.array([-30.0, 25.0, -20.0]) + random.uniform(-20, 20, size=3)
    affine[:3, 3] = heart - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    frames = es_frame + int(random.integers(10, 18))
    gain = float(random.uniform(120, 500))
    height_cm, weight_kg = round(float(random.normal(170, 9)), 1), round(float(random.normal(75, 12)), 1)
    return _Scan(
        name=f"patient{number:03d}",
        size_hw_d=shape,
        spacing_mm=spacing_mm,
        levels=np.linspace(first, last, depth),
        ed_frame=ed_frame,
        es_frame=es_frame,
        frames=frames,
        gain=gain,
        height_cm=height_cm,
        weight_kg=weight_kg,
        affine=affine,
        frame_seconds=round(60 / random.uniform(50, 90) / frames, 4),
    )


def _write_patient(
    folder: Path, number: int, *, seed: int, size_hw_d: list[int] | None, zoom: float, series: bool
) -> None:
    """Write a patient's folder."""
    scan = _plan_scan(number, seed=seed, size_hw_d=size_hw_d, zoom=zoom)
    place = folder / scan.name
    place.mkdir(parents=True)
    info = {
        "ED": scan.ed_frame,
        "ES": scan.es_frame,
        "Group": "NOR",
        "Height": scan.height_cm,
        "NbFrame": scan.frames,
        "Weight": scan.weight_kg,
    }
    (place / "Info.cfg").write_text("".join(f"{key}: {value}\n" for key, value in info.items()))
    for frame in (scan.ed_frame, scan.es_frame):
        image, labels = _render_frame(scan, frame, seed=seed, number=number)
        _save(image, scan, place / f"{scan.name}_frame{frame:02d}.nii.gz")
        _save(labels, scan, place / f"{scan.name}_frame{frame:02d}_gt.nii.gz")
    if series:
        cycle = [_render_frame(scan, frame, seed=seed, number=number) for frame in range(1, scan.frames + 1)]
        for voxels, ending in zip(zip(*cycle, strict=True), ("", "_gt"), strict=True):
            _save(np.stack(voxels, axis=-1), scan, place / f"{scan.name}_4d{ending}.nii.gz")


def _generator(*entropy: int) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
    return generator


def _phase(scan: _Scan, frame: int) -> float:
    """Return the contraction at a frame: 0 at ED, rising to 1 at ES and falling to the end of the cycle."""
    systole = scan.es_frame - scan.ed_frame
    since = (frame - scan.ed_frame) % scan.frames
    progress = since / systole if since <= systole else (scan.frames - since) / (scan.frames - systole)
    return float(0.5 - 0.5 * np.cos(np.pi * progress))


def _render_frame(scan: _Scan, frame: int, *, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Render the image (int16) and labels (uint8) of a frame, each in axis order (x, y, z)."""
    subject = _generator(seed, number)
    body = draw_anatomy(1, AnatomyRanges(), subject)
    look = draw_appearance(1, AppearanceRanges(), subject)
    phase = _phase(scan, frame)
    base = _DESCENT * phase
    levels = torch.from_numpy((scan.levels - base) / (1 - base)).float()
    repeat = torch.zeros(len(levels), dtype=torch.long)
    columns, rows, _ = scan.size_hw_d
    tissues, labels = anatomy(
        select(body, repeat), level=levels, phase=phase, size_hw=(rows, columns), spacing_mm=scan.spacing_mm[0]
    )
    image = signal(tissues, select(look, repeat), _generator(seed, number, frame)) * scan.gain
    return image.round().clamp(0, 32767).permute(2, 1, 0).short().numpy(), labels.permute(2, 1, 0).numpy()


def _save(voxels: np.ndarray, scan: _Scan, path: Path) -> None:
    """Write voxels with the scan's affine as both sform and qform."""
    image = nib.Nifti1Image(np.ascontiguousarray(voxels), scan.affine)
    image.set_sform(scan.affine, code="scanner")
    image.set_qform(scan.affine, code="scanner")
    image.header.set_xyzt_units("mm", "sec")
    if voxels.ndim == 4:
        image.header["pixdim"][4] = scan.frame_seconds
    nib.save(image, path)
