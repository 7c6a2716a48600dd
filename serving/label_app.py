"""The app that MONAI Label runs: its bundle tasks, which refuse what a bundle cannot use and say why.

It is copied into the app's folder as `main.py`. MONAI Label's server imports it from there, and so does each process
that it starts for a training. It imports nothing of this repository: `components` comes from the bundles.
"""

from __future__ import annotations

import logging
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import requests
from monai.transforms import LoadImage
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.utils.convert import binary_to_image
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask

logger = logging.getLogger(__name__)


class InferTask(BundleInferTask):
    """A bundle's inference, which answers an image that the bundle rejects with the bundle's reason."""

    def run_pre_transforms(self, data: dict[str, Any], transforms: Sequence[Callable]) -> dict[str, Any]:
        """Load and prepare an image.

        Args:
            data: the request; `image` is the path.
            transforms: the bundle's preprocessing.

        Returns:
            the request with the image.

        Raises:
            MONAILabelException: of INVALID_INPUT, with the sentence by which the bundle rejects the image.
        """
        image = str(data["image"])
        try:
            return super().run_pre_transforms(data, transforms)
        except Exception as error:
            is_sent = Path(image).parent == Path(tempfile.gettempdir())
            reason = _reason(error, {image: "the image sent" if is_sent else f"the image {Path(image).name}"})
            if reason is None:
                raise
            logger.error("%s", reason)
            raise MONAILabelException(MONAILabelError.INVALID_INPUT, reason) from None


class TrainTask(BundleTrainTask):
    """A bundle's training, which leaves labels out that the bundle rejects."""

    def fault(self, image: str, label: str) -> str | None:
        """Say why a bundle rejects a label.

        Args:
            image: path of the image.
            label: path of its label.

        Returns:
            the reason, None for a label to train on.
        """
        try:
            self.bundle_config.get_parsed_content("train#preprocessing")({"image": image, "label": label})
        except Exception as error:
            names = {label: f"the label {Path(label).name}", image: f"the image {Path(image).name}"}
            return _reason(error, names) or f"{type(error).__name__}: {error}"
        return None

    def sorted_out(self, datastore: Datastore) -> tuple[list[dict[str, str]], dict[str, str]]:
        """Return the pairs of image and label to train on, and why others are left out, by the label's file name.

        Raises:
            MONAILabelException: of INVALID_INPUT, when there is none to train on.
        """
        pairs, left_out = [], {}
        for pair in super()._fetch_datalist({"model": ""}, datastore):
            reason = self.fault(**pair)
            if reason is None:
                pairs.append(pair)
            else:
                left_out[Path(pair["label"]).name] = reason
                logger.warning("left out of training: %s", reason)
        if not pairs:
            reasons = "".join(f"; {reason}" for reason in left_out.values())
            message = f"there is no label to train on: submit one first{reasons}"
            raise MONAILabelException(MONAILabelError.INVALID_INPUT, message)
        return pairs, left_out

    def _fetch_datalist(self, _request: Mapping[str, Any], datastore: Datastore) -> list[dict[str, str]]:
        return self.sorted_out(datastore)[0]


class App(MONAILabelApp):
    """The bundles of the folder `model`, those that the configuration `models` names, separated by commas."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.bundles = {name: str(Path(app_dir, "model", name)) for name in conf["models"].split(",")}
        description = "Segmentation from few labelled volumes, by MONAI Bundles"
        super().__init__(app_dir, studies, conf, name="AutoSAM bundles", description=description)

    def init_infers(self) -> dict[str, InferTask]:
        """Return the bundles' inference by name."""
        return {name: InferTask(bundle, self.conf) for name, bundle in self.bundles.items()}

    def init_trainers(self) -> dict[str, TrainTask]:
        """Return the bundles' training by name."""
        return {name: TrainTask(bundle, self.conf) for name, bundle in self.bundles.items()}

    def init_strategies(self) -> dict[str, Strategy]:
        """Return what chooses the next sample, by name."""
        return {"random": Random(), "first": First()}

    def init_datastore(self) -> Datastore:
        """Return MONAI Label's store of images and labels, which here takes no label that every bundle rejects."""
        store = super().init_datastore()
        save = store.save_label

        def save_checked(image: str, label: str, tag: str, info: dict[str, Any], **more: Any) -> str:
            of_image = self.image_file(image, store)
            if label.endswith(".bin"):  # as OHIF sends it: voxels without a header
                try:
                    label = binary_to_image(of_image, label)
                except ValueError as error:
                    message = f"the label of {image} has another number of voxels than the image: {error}"
                    raise MONAILabelException(MONAILabelError.INVALID_INPUT, message) from None
            reasons = [trainer.fault(of_image, label) for trainer in self._trainers.values()]
            if reasons and all(reasons):
                message = f"{reasons[0]}".replace(Path(label).name, f"of {image}")
                logger.error("%s", message)
                raise MONAILabelException(MONAILabelError.INVALID_INPUT, message)
            if isinstance(store, DICOMWebDatastore):
                info.setdefault("label_info", self.label_info(label))
            return save(image, label, tag, info, **more)

        store.save_label = save_checked
        return store

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Segment an image, or raise ImageNotFoundException when there is none of its name."""
        image = request.get("image")
        if isinstance(image, str) and request.get("model") in self._infers and not Path(image).exists():
            self.image_file(image, datastore or self.datastore())
        return super().infer(request, datastore)

    def image_file(self, image: str, datastore: Datastore) -> str:
        """Return the path of an image.

        Args:
            image: its name.
            datastore: where to look.

        Raises:
            ImageNotFoundException: when there is none.
        """
        try:
            file = datastore.get_image_uri(image)
        except (IndexError, requests.RequestException):  # a DICOMweb server's
            file = ""
        if not file:
            raise ImageNotFoundException(f"there is no image {image}: GET /datastore/?output=all lists those that are")
        return file

    def label_info(self, label: str) -> list[dict[str, str]]:
        """Return names for the segments of a DICOM SEG, in the order in which MONAI Label takes them.

        Args:
            label: path of a label.

        Returns:
            one entry for each class that the label holds, those of the first bundle.
        """
        names = {index: name for name, index in next(iter(self._infers.values())).labels.items()}
        held = np.unique(LoadImage(image_only=True)(label)).astype(int).tolist()
        return [{"name": names[index], "description": names[index]} for index in held if index in names]


def _reason(error: Exception, names: Mapping[str, str]) -> str | None:
    """Return the sentence of an error that a bundle's `components` raise, with names for paths; None for others."""
    from components.base.error_line import (
        summarize_traceback,  # of the bundles, which are on the path only once they are read
    )

    sentence, is_own = summarize_traceback("".join(traceback.format_exception(error)))
    for path, name in names.items():
        sentence = sentence.replace(path, name)
    return sentence if is_own else None
