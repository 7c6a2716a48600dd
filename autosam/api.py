"""Segmentation and measurement from Python."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from PIL import Image

from autosam.correction import Correction
from autosam.folders import CORRECT, DEFAULT, find_bundle
from autosam.record import inference_settings

_TEXTS = ("case", "ed_es_by", "flag", "reason")

Measures = dict[str, float | str]
AnyImage = str | os.PathLike[str] | np.ndarray | torch.Tensor


class Segmenter:
    """A bundle's network and processing, kept between calls.

    Args:
        bundle: a bundle's folder; or a name, of a folder in the working directory or else of a bundle that comes with
            the package.
        knobs: knobs of the bundle's `inference.json`, such as `test_time_views=4`.

    Attributes:
        class_names: the classes without the background, in the order of their labels.

    Raises:
        FileNotFoundError: if there is no such bundle, or it has no trained model.
        ValueError: if the bundle cannot segment or has no such knob, or its model does not fit.
    """

    def __init__(self, bundle: str | os.PathLike[str] = DEFAULT, **knobs: Any) -> None:
        self.bundle = find_bundle(Path(bundle)).absolute()
        overlays, known = inference_settings(self.bundle)
        self._configs = [f"{self.bundle}/configs/{name}.json" for name in ("inference", *overlays)]
        self._knobs: dict[str, Any] = {"bundle_root": str(self.bundle), **known, **knobs}
        parser = self._parser({})
        if unknown := sorted(set(knobs) - set(parser.get())):
            raise ValueError(f"{self.bundle.name} has no knob {', '.join(unknown)}: see its configs/inference.json")
        self._network = parser.get_parsed_content("network")
        settings = parser.get_parsed_content("settings")
        self.class_names: list[str] = settings["class_names"]
        self._pictures: bool = settings["pictures"]
        loader = parser.get_parsed_content("handlers")[0]
        engine = Engine(lambda _engine, _batch: None)
        loader.attach(engine)  # it loads the weights when an engine starts
        engine.run([None])

    def __call__(self, image: AnyImage, *, affine: np.ndarray | None = None) -> MetaTensor:
        """Segment one image.

        Args:
            image: a path to a volume, a cine, a DICOM study or a picture. Or an array: `(H,W,D)`, of a cine
                `(H,W,D,T)`, of a picture `(H,W)` or `(H,W,3)`. Or a MetaTensor, also `(1,H,W,D)` as MONAI loads it.
            affine: affine of an array, 4x4, from voxels to mm. A picture needs none.

        Returns:
            labels `(1,H,W,D)`, or `(1,H,W,D,T)` of a cine, uint8, on the image's own grid with its affine. Those of a
            picture are `(1,W,H,1)`, as MONAI reads pictures.

        Raises:
            FileNotFoundError: if the path does not exist.
            ValueError: if the image cannot be segmented, there are several, or an array has no affine.
        """
        with self._file(image, affine) as path, tempfile.TemporaryDirectory() as folder:
            labels = _Labels()
            self._run(path, self._parser({"saving": [], "handlers": [labels], "output_dir": folder}))
        if len(labels.frames) == 1:
            return labels.frames[0]
        stacked = torch.stack([frame.as_tensor() for frame in labels.frames], dim=-1)
        return MetaTensor(stacked, affine=labels.frames[0].affine, meta=labels.frames[0].meta)

    def correct(
        self, image: AnyImage, clicks: Mapping[str, Any] | str, *, affine: np.ndarray | None = None
    ) -> MetaTensor:
        """Segment one volume or picture, and correct it by clicks.

        Args:
            image: as for a call.
            clicks: lists of voxels by class such as `{"LV": [[60, 71, 4]]}`, or their JSON file; see
                `components.data.clicks.read_clicks`.
            affine: as for a call.

        Returns:
            labels as for a call; slices without a click are equal to those of a call.

        Raises:
            FileNotFoundError: as for a call.
            ValueError: as for a call, a click does not fit the image, or this is a cine.
            RuntimeError: as for `correction`.
        """
        return self.correction(image, affine=affine)(clicks)

    def correction(self, image: AnyImage, *, affine: np.ndarray | None = None) -> Correction:
        """Prepare one volume or picture, to correct it by clicks again and again.

        Args:
            image: as for a call.
            affine: as for a call.

        Returns:
            a function from all clicks so far to the labels. It segments the image once.

        Raises:
            FileNotFoundError: as for a call.
            ValueError: as for a call, or this is a cine.
            RuntimeError: MONAI's, whose cause says that clicks cannot correct this bundle.
        """
        find_bundle(self.bundle, CORRECT)
        with self._file(image, affine) as path:
            parser = self._parser({"clicks": {}}, f"{self.bundle}/configs/{CORRECT}")
            self._set_image(path, parser)
            return Correction(parser)

    def measure(
        self, image: AnyImage, *, affine: np.ndarray | None = None, heart_rate: float | None = None
    ) -> Measures:
        """Measure ventricular function in one volume or cine.

        Args:
            image: as for a call; a volume counts as end-diastole.
            affine: as for a call.
            heart_rate: beats per minute; None to take it from a cine's frame time if its frames cover the cycle.

        Returns:
            the row of `function.csv`: volumes in ml, ejection fractions in percent, mass in g, and which frames they
            are of. Unknown ones are nan. `flag` and `reason` say what to check.

        Raises:
            ValueError: as for a call, or if the bundle's classes are not RV, Myo and LV.
        """
        find_bundle(self.bundle, "function.json")
        with self._file(image, affine) as path, tempfile.TemporaryDirectory() as folder:
            overrides: dict[str, Any] = {"handlers": [], "output_dir": folder, "heart_rate": heart_rate}
            self._run(path, self._parser(overrides, f"{self.bundle}/configs/function.json"))
            with (Path(folder) / "function.csv").open(newline="") as file:
                (row,) = csv.DictReader(file)
        return {name: value if name in _TEXTS else float(value or "nan") for name, value in row.items()}

    def _parser(self, overrides: Mapping[str, Any], *further: str) -> ConfigParser:
        """Return the configs with the network that is loaded, if it is."""
        parser = ConfigParser()
        parser.read_config([*self._configs, *further])
        network = {"network": self._network} if hasattr(self, "_network") else {}
        parser.update({**self._knobs, **network, **overrides})
        return parser

    def _run(self, path: Path, parser: ConfigParser) -> None:
        """Run inference on the image of a path."""
        self._set_image(path, parser)
        parser.get_parsed_content("evaluator").run()

    def _set_image(self, path: Path, parser: ConfigParser) -> None:
        """Make the configs read the image of a path, which must be the only one."""
        parser["dataset_dir"] = str(path)
        files = parser.get_parsed_content("dataset").files
        if files != 1:
            raise ValueError(f"{path} has {files} images: expected one; `autosam segment` takes a folder of them")

    @contextmanager
    def _file(self, image: AnyImage, affine: np.ndarray | None) -> Iterator[Path]:
        """Give an image's path; one in memory becomes a temporary file, so that both go the same way."""
        if isinstance(image, str | os.PathLike):
            yield Path(image).absolute()
            return
        if affine is None and isinstance(image, MetaTensor):
            affine = image.affine.numpy()
            image = image[0] if image.ndim == 4 and len(image) == 1 else image
        voxels = np.asarray(image.cpu() if isinstance(image, torch.Tensor) else image)
        with tempfile.TemporaryDirectory() as folder:
            if self._pictures:
                path = Path(folder) / "image.png"
                Image.fromarray(voxels).save(path)
            elif affine is None:
                raise ValueError("an array has no voxel sizes: give affine=, 4x4, from voxels to mm")
            else:
                path = Path(folder) / "image.nii.gz"
                nib.save(nib.Nifti1Image(_storable(voxels), np.asarray(affine, np.float64)), path)
            yield path


class _Labels:
    """Ignite handler that keeps the label map of each frame."""

    def __init__(self) -> None:
        self.frames: list[MetaTensor] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        output: Any = engine.state.output
        self.frames += [item["pred"].to(torch.uint8).cpu() for item in output]


def load(bundle: str | os.PathLike[str] = DEFAULT, **knobs: Any) -> Segmenter:
    """Load a bundle once for many images; see `Segmenter`."""
    return Segmenter(bundle, **knobs)


def segment(
    image: AnyImage,
    *,
    affine: np.ndarray | None = None,
    bundle: str | os.PathLike[str] = DEFAULT,
    **knobs: Any,
) -> MetaTensor:
    """Segment one image with a bundle, as `autosam segment` does; see `Segmenter`.

    Args:
        image: path, array or MetaTensor.
        affine: affine of an array.
        bundle: a bundle's folder or name.
        knobs: knobs of its `inference.json`.

    Returns:
        the labels on the image's own grid.
    """
    return load(bundle, **knobs)(image, affine=affine)


def measure(
    image: AnyImage,
    *,
    affine: np.ndarray | None = None,
    bundle: str | os.PathLike[str] = DEFAULT,
    heart_rate: float | None = None,
    **knobs: Any,
) -> Measures:
    """Measure ventricular function in one volume or cine, as `autosam segment --measure` does.

    Args:
        image: path, array or MetaTensor.
        affine: affine of an array.
        bundle: a bundle's folder or name.
        heart_rate: beats per minute; None to take it from the cine.
        knobs: knobs of its `inference.json`.

    Returns:
        volumes in ml, ejection fractions in percent and mass in g by name; see `Segmenter.measure`.
    """
    return load(bundle, **knobs).measure(image, affine=affine, heart_rate=heart_rate)


def _storable(voxels: np.ndarray) -> np.ndarray:
    """Return an array of a type that NIfTI files have."""
    stored = {"int64": np.int32, "float16": np.float32, "bool": np.uint8}
    return voxels.astype(stored.get(voxels.dtype.name, voxels.dtype))
