"""The app that MONAI Label runs: its bundle tasks, which refuse what a bundle cannot use and say why.

It is copied into the app's folder as `main.py`. MONAI Label's server imports it from there, and so does each process
that it starts for a training. `components` comes from the bundles, not from this repository.
"""

from __future__ import annotations

import glob
import json
import logging
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import requests
import torch
from monai.transforms import LoadImage
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from monailabel.datastore.utils.convert import binary_to_image
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelError, MONAILabelException
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.interfaces.tasks.infer_v2 import InferType
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask
from monailabel.transform.writer import Writer

from autosam.worth import WORTH
from serving.next_image import as_text, from_text, lowest, most_different

logger = logging.getLogger(__name__)

MODEL = "model.pt"
CORRECT = "correct.json"
STATS = "models/train_stats.json"  # of a bundle's last training
PREDICTIONS = "predictions"  # in the notes on an image: what inferences said about it, by the model's name
DICE, EMBEDDING = "predicted_dice", "embedding"
SECONDS_OF_INFERENCE = 20.0  # a choice of the next image begins no inference after them
LEFT_OUT = "logs/batch_left_out.json"  # of the app: what the last batch could not segment, and why
_DEFAULT_SETTINGS = {"device", "pretrained", "max_epochs", "val_split"}
_OF_SEVERAL_GPUS = {"multi_gpu", "gpus"}
_OF_THE_LIST = (  # methods of a datastore that read or change its list of images and labels
    "_init_from_datastore_file",
    "_reconcile_datastore",
    "_update_datastore_file",
    "get_image_info",
    "get_label_info",
    "json",
    "update_image_info",
    "update_label_info",
)
_OF_THE_FOLDER = (  # likewise; those of a DICOMweb server wait for it, and others shall not wait with them
    "add_image",
    "datalist",
    "get_image_uri",
    "get_label_uri",
    "get_labeled_images",
    "get_unlabeled_images",
    "list_images",
    "remove_image",
    "remove_label",
    "save_label",
    "status",
)


class InferTask(BundleInferTask):
    """A bundle's inference, which answers an image that the bundle rejects with the bundle's reason."""

    def __init__(self, path: str, conf: dict[str, str], type: str = "") -> None:  # noqa: A002 - MONAI Label's name
        super().__init__(path, conf, type=type)
        self._config |= {"model_filename": [MODEL], "result_dtype": "uint8"}
        self._checking = threading.Lock()

    def info(self) -> dict[str, Any]:
        """Return MONAI Label's description, with what the model is worth beside the others."""
        return super().info() | worth_of(Path(self.bundle_path).name)

    def fault(self, image: str) -> str | None:
        """Say why a bundle rejects an image.

        Args:
            image: its path.

        Returns:
            the reason, None for an image that it can segment.
        """
        with self._checking:  # with a config of its own, since an inference may run meanwhile
            try:
                config = self._load_bundle_config(self.bundle_path, self.bundle_config_path)
                config.get_parsed_content("preprocessing")({"image": image})
            except Exception as error:
                return (
                    _reason(error, {image: "the image sent"})
                    or f"the image sent cannot be read: {type(error).__name__}"
                )
        return None

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
        with self._own_reasons(str(data["image"])):
            return super().run_pre_transforms(data, transforms)

    def versions(self) -> dict[str, str]:
        """Return what the predictions depend on besides the image, by their names; no embedding without an encoder."""
        model = str(Path(self.get_path()).stat().st_mtime_ns)
        encoder = getattr(self.network, "encoder", None)
        if encoder is None:
            return {DICE: model}
        frozen = None if encoder.trainable else bytes(encoder.fingerprint.tolist()).hex()
        return {DICE: model, EMBEDDING: frozen or model}

    def run_inferer(self, data: dict[str, Any], convert_to_batch: bool = True, device: str = "cuda") -> dict[str, Any]:
        """Let the network segment the image, and note the predicted Dice and the mean embedding.

        The mean is over space, slices and test-time views. The Dice is rescaled as for RV, Myo and LV; for other
        classes it only ranks images.
        """
        from components.function.quality import expected_dice, predicted_dice  # of the bundles

        encoder = getattr(self._get_network(device, data), "encoder", None)
        means: list[torch.Tensor] = []
        hook = encoder and encoder.register_forward_hook(lambda _, __, output: means.append(output.mean((2, 3)).cpu()))
        try:
            answer = super().run_inferer(data, convert_to_batch, device)
        finally:
            if hook:
                hook.remove()
        inferer, prediction = self.bundle_config.get_parsed_content("inferer"), answer[self.key_pred]
        is_averaged = inferer.test_time_views > 1 or inferer.planes > 1
        dice = predicted_dice(expected_dice(prediction if is_averaged else prediction.softmax(dim=0))).volume
        embedding = {EMBEDDING: as_text(torch.cat(means).float().mean(0).numpy())} if means else {}
        return answer | {PREDICTIONS: {DICE: dice} | embedding}

    def writer(self, data: dict[str, Any], extension: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
        """Write the answer, and return its file and notes, with the predictions.

        A NIfTI file has exactly the image's affine, which MONAI Label's own writer rounds.
        """
        chosen = {"result_extension": extension, "result_dtype": dtype}
        data |= {name: value for name, value in chosen.items() if value is not None}
        file, notes = Writer(label=self.output_label_key, json=self.output_json_key, nibabel=True)(data)
        return file, notes | {PREDICTIONS: data.get(PREDICTIONS, {})}

    @contextmanager
    def _own_reasons(self, image: str) -> Iterator[None]:
        """Raise an error of the bundle as a MONAILabelException of INVALID_INPUT with its sentence."""
        try:
            yield
        except Exception as error:
            is_sent = Path(image).parent == Path(tempfile.gettempdir())
            name = "the image sent" if is_sent else f"the image {Path(image).name}"
            reason = _reason(error, {image: name})
            if reason is None:
                raise
            logger.error("%s", reason)
            raise MONAILabelException(MONAILabelError.INVALID_INPUT, reason) from None


class ClickTask(InferTask):
    """A bundle's inference with the correction by clicks.

    A request has all clicks on an image so far, as lists of voxels by class and for the background. They correct the
    network's answer for the image. This and the embeddings of slices that have clicks are kept until another image or
    model comes, so a click costs a decoder only.
    """

    def __init__(self, path: str, conf: dict[str, str]) -> None:
        super().__init__(path, conf, InferType.DEEPEDIT)
        self.labels["background"] = len(self.labels)  # OHIF takes 0 for missing, and another class for the background
        self._kept: tuple[Any, dict[str, Any]] = (None, {})

    def _load_bundle_config(self, path: str, config: str) -> monai.bundle.ConfigParser:
        loaded = super()._load_bundle_config(path, config)
        overlay = monai.bundle.ConfigParser.load_config_file(Path(config).with_name(CORRECT))
        loaded.update(overlay | {"clicks": {}})
        return loaded

    def run_pre_transforms(self, data: dict[str, Any], transforms: Sequence[Callable]) -> dict[str, Any]:
        """Load and prepare an image, as `InferTask`, unless it was the last one."""
        files = (Path(str(data["image"])), Path(self.get_path()))
        key = (*((file, file.stat().st_mtime_ns) for file in files), data["device"])
        if key != self._kept[0]:
            prepared = super().run_pre_transforms(dict(data), transforms)
            of_image = {name: prepared[name] for name in prepared if name == self.key_image or name not in data}
            self._kept = (key, of_image)
        request = {name: value for name, value in data.items() if name != self.key_image}
        return self._kept[1] | request

    def run_inferer(self, data: dict[str, Any], convert_to_batch: bool = True, device: str = "cuda") -> dict[str, Any]:
        """Let the network segment the image, unless it was the last one."""
        kept = self._kept[1]
        if self.key_pred not in kept:
            answer = super().run_inferer(data, convert_to_batch, device)
            kept |= {self.key_pred: answer[self.key_pred], "embeddings": {}}
        return data | {name: kept[name] for name in (self.key_pred, "embeddings")}

    def run_post_transforms(self, data: dict[str, Any], transforms: Sequence[Callable]) -> dict[str, Any]:
        """Correct the network's answer by the request's clicks.

        Args:
            data: the request with image and answer.
            transforms: the bundle's postprocessing.

        Raises:
            MONAILabelException: of INVALID_INPUT, if a click does not fit the image.
        """
        correction = self.bundle_config.get_parsed_content("correction")
        correction.clicks = {name: data[name] for name in self.labels if data.get(name)}
        with self._own_reasons(str(data["image_path"])):
            return super().run_post_transforms(data, transforms)


class TrainTask(BundleTrainTask):
    """A bundle's training, which leaves labels out that the bundle rejects and notes what came of it."""

    def __init__(self, path: str, conf: dict[str, str]) -> None:
        super().__init__(path, conf)
        self._checking = threading.Lock()

    def config(self) -> dict[str, Any]:
        """Return the settings that a training takes, without those of MLflow and of other workflows."""
        config = super().config()
        shown = set(self._displayed()) | _DEFAULT_SETTINGS
        shown |= _OF_SEVERAL_GPUS if torch.cuda.device_count() > 1 else set()
        return {name: value for name, value in config.items() if name in shown} | {"model_filename": [MODEL]}

    def stats(self) -> dict[str, Any]:
        """Return what the last training came to; nothing before the first."""
        try:
            return json.loads(Path(self.bundle_path, STATS).read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train on the labels of a datastore.

        Args:
            request: the settings; those that are missing have the values that `config` gives.
            datastore: the images and labels.

        Returns:
            as `stats`.
        """
        super().__call__({"max_epochs": 50, **self._displayed(), **request}, datastore)
        return self.stats()

    def _displayed(self) -> dict[str, Any]:
        keys = [key for key in self.const.key_displayable_configs() if self.bundle_config.get(key)]
        return {name: value for key in keys for name, value in self.bundle_config.get_parsed_content(key).items()}

    def _load_checkpoint(self, model: str, pretrained: bool, handlers: list[Any]) -> None:
        """Make a training begin with the model; the config's handlers are shared by all trainings."""
        handlers[:] = [handler for handler in handlers if handler.get("_target_") != "CheckpointLoader"]
        if pretrained:
            super()._load_checkpoint(model, pretrained, handlers)

    def run_single_gpu(self, _request: dict[str, Any], overrides: dict[str, Any]) -> None:
        """Train as `monai.bundle run` does, and note the scores before and after, the epochs and the seconds."""
        start = time.time()
        files = {"meta_file": self.bundle_metadata_path, "config_file": self.bundle_config_path}
        workflow = monai.bundle.create_workflow(run_id="run", init_id=None, final_id=None, **files, **overrides)
        workflow.run()
        workflow.finalize()
        trainer = workflow.parser.get_parsed_content("train#trainer").state
        handlers = workflow.parser.get_parsed_content("train#handlers")
        checkpoints = next(each for each in handlers if type(each).__name__ == "TrainingCheckpoints")
        stats = {
            "epoch": trainer.epoch,
            "total_epochs": trainer.max_epochs,
            "total_time": round(time.time() - start, 1),
            "training_cases": len(overrides["train#dataset#data"]),
            "validation_cases": len(overrides.get("validate#dataset#data") or []),
        }
        scores = {"start_metric": checkpoints.start_score, "best_metric": checkpoints.best_score}
        stats |= {name: round(score, 4) for name, score in scores.items() if score is not None}
        Path(self.bundle_path, STATS).write_text(json.dumps(stats))

    def fault(self, image: str, label: str) -> str | None:
        """Say why a bundle rejects a label.

        Args:
            image: path of the image.
            label: path of its label.

        Returns:
            the reason, None for a label to train on.
        """
        with self._checking:
            try:
                self.bundle_config.get_parsed_content("train#preprocessing")({"image": image, "label": label})
            except Exception as error:
                names = {label: f"the label {Path(label).name}", image: f"the image {Path(image).name}"}
                return _reason(error, names) or f"the label {Path(label).name} cannot be read: {type(error).__name__}"
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


class BatchTask(BatchInferTask):
    """An inference on many images, one after the other, which goes on past those that a bundle rejects.

    Args:
        report: a file for the reasons by the image's name, written anew by every batch.
    """

    def __init__(self, report: Path) -> None:
        self.report = report

    def left_out(self) -> dict[str, str]:
        """Return the reasons why the last batch has left images out, by their names."""
        return json.loads(self.report.read_text()) if self.report.is_file() else {}

    def __call__(self, request: dict[str, Any], datastore: Datastore, infer: Callable) -> dict[str, Any]:
        """Segment the images that a request selects.

        Args:
            request: the settings.
            datastore: the images, and where the labels are stored.
            infer: segments one image.

        Returns:
            MONAI Label's answers by the image's name; of an image that is left out the reason, as `left_out`.
        """
        left_out: dict[str, str] = {}

        def infer_or_leave_out(one: dict[str, Any], store: Datastore) -> dict[str, Any]:
            try:
                return infer(one, store)
            except Exception as error:
                is_refused = isinstance(error, MONAILabelException)
                reason = error.msg if isinstance(error, MONAILabelException) else f"{type(error).__name__}: {error}"
                logger.warning("left out of the batch: %s: %s", one["image"], reason, exc_info=not is_refused)
                left_out[one["image"]] = reason
                self.report.write_text(json.dumps(left_out))
                return {"left_out": reason}

        self.report.parent.mkdir(exist_ok=True)
        self.report.write_text("{}")
        has_gpus = bool(request.get("multi_gpu", True)) and torch.cuda.is_available()
        return super().__call__(request | {"multi_gpu": has_gpus, "max_workers": 1}, datastore, infer_or_leave_out)


class _ByInference(Strategy):
    """A choice of the next image by what a model's last inference said about each.

    Images without a prediction by the present model are segmented first. After
    `SECONDS_OF_INFERENCE` no further one is begun, so the choice is among the images known by then. The next request
    goes on with the others. Images that the model rejects are never chosen.
    """

    def __init__(self, app: App, prediction: str, description: str) -> None:
        super().__init__(description)
        self.app, self.prediction = app, prediction

    def known(self, images: Iterable[str], datastore: Datastore) -> dict[str, Any]:
        """Return the prediction of images by their names, after inferences in the given order while time is left.

        Raises:
            MONAILabelException: of INVALID_INPUT, if no served model makes the prediction.
        """
        end = time.monotonic() + SECONDS_OF_INFERENCE
        tasks = {name: task for name, task in self.app._infers.items() if not isinstance(task, ClickTask)}
        model = next((name for name, task in tasks.items() if self.prediction in task.versions()), None)
        if model is None:
            message = f"none of {', '.join(tasks)} has an encoder: serve a bundle that has one, such as linearhead_acdc"
            raise MONAILabelException(MONAILabelError.INVALID_INPUT, message)
        version, values, missing = tasks[model].versions()[self.prediction], {}, []
        for image in images:
            noted = datastore.get_image_info(image).get(PREDICTIONS, {}).get(model, {}).get(self.prediction)
            if noted and noted["of"] == version:
                values[image] = noted["value"]
            else:
                missing.append(image)
        for image in missing:
            if values and time.monotonic() > end:
                logger.info("the next image is chosen among %d of %d", len(values), len(values) + len(missing))
                break
            try:
                answer = self.app.infer({"model": model, "image": image, "skip_writer": True}, datastore)
            except MONAILabelException as error:
                logger.warning("%s is not chosen: %s", image, error.msg)
                continue
            values[image] = answer["params"][PREDICTIONS][self.prediction]
        return values


class LowestDice(_ByInference):
    """The image whose predicted Dice is lowest, by the first served bundle."""

    def __init__(self, app: App) -> None:
        super().__init__(app, DICE, "The image that the model is least sure of")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Return the image's name as `id`, and its Dice as `weight`; None if there is none to label."""
        values = self.known(sorted(datastore.get_unlabeled_images(request.get("label_tag"))), datastore)
        return {"id": lowest(values), "weight": min(values.values())} if values else None


class MostDifferent(_ByInference):
    """The image least like all labelled ones, by the encoder of the first served bundle that has one.

    Without a labelled image it is the one most like the mean of all. See `most_different`. Inferences alternate between
    unlabelled and labelled images, so that both are known from the start.
    """

    def __init__(self, app: App) -> None:
        super().__init__(app, EMBEDDING, "The image least like those that are labelled")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Return the image's name as `id`; None if there is none to label."""
        tag = request.get("label_tag")
        unlabelled, labelled = sorted(datastore.get_unlabeled_images(tag)), sorted(datastore.get_labeled_images(tag))
        both = [name for name in chain(*zip_longest(unlabelled, labelled)) if name]
        known = {name: from_text(text) for name, text in self.known(both, datastore).items()}
        candidates = {name: known[name] for name in unlabelled if name in known}
        if not candidates:
            return None
        return {"id": most_different(candidates, [known[name] for name in labelled if name in known])}


class App(MONAILabelApp):
    """The bundles of the folder `model`, those that the configuration `models` names, separated by commas."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        names = sorted(conf["models"].split(","), key=_seconds_per_dice)
        self.bundles = {name: str(Path(app_dir, "model", name)) for name in names}
        description = "Segmentation from few labelled volumes, by MONAI Bundles"
        super().__init__(app_dir, studies, conf, name="AutoSAM bundles", description=description)

    def init_infers(self) -> dict[str, InferTask]:
        """Return the bundles' inference by name, and as `<name>_clicks` that with clicks where a bundle has it."""
        tasks = {name: InferTask(bundle, self.conf) for name, bundle in self.bundles.items()}
        of_clicks = {f"{name}_clicks": bundle for name, bundle in self.bundles.items() if _takes_clicks(bundle)}
        return tasks | {name: ClickTask(bundle, self.conf) for name, bundle in of_clicks.items()}

    def init_trainers(self) -> dict[str, TrainTask]:
        """Return the bundles' training by name."""
        return {name: TrainTask(bundle, self.conf) for name, bundle in self.bundles.items()}

    def init_strategies(self) -> dict[str, Strategy]:
        """Return what chooses the next sample, by name; Slicer and OHIF begin with the first one."""
        return {
            "lowest_predicted_dice": LowestDice(self),
            "random": Random(),
            "first": First(),
            "most_different_embedding": MostDifferent(self),
        }

    def init_batch_infer(self) -> BatchTask:
        """Return the inference on many images."""
        return BatchTask(Path(self.app_dir, LEFT_OUT))

    def init_datastore(self) -> Datastore:
        """Return MONAI Label's store, which here takes no image and no label that every bundle rejects."""
        store = super().init_datastore()
        lock = threading.RLock()  # requests and the watcher of the folder have a thread each
        is_remote = isinstance(store, DICOMWebDatastore)
        if not is_remote:  # these leave the list to the watcher, so that a later request might still see the removed
            for name in ("remove_image", "remove_label"):
                setattr(store, name, _and_refreshes(getattr(store, name), store))
        for name in _OF_THE_LIST if is_remote else _OF_THE_LIST + _OF_THE_FOLDER:
            setattr(store, name, _one_at_a_time(getattr(store, name), lock))
        if is_remote:  # its methods call these of its base, which lock a file first: the watcher would wait for ever
            for name in ("add_image", "save_label"):
                setattr(LocalDatastore, name, _one_at_a_time(getattr(LocalDatastore, name), lock))
        save, add = store.save_label, store.add_image

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
            if is_remote:
                info.setdefault("label_info", self.label_info(label))
            else:
                self.check_place(Path(store._datastore.label_path(tag), image))
            return save(image, label, tag, info, **more)

        def add_checked(image: str, file: str, info: dict[str, Any]) -> str:
            self.check_readable(file)
            with lock:
                ending = store._to_id(Path(file).name)[1]
                place = Path(store._datastore.image_path(), f"{image}{ending}")
                if image in store.list_images() or place.exists() or place.is_symlink():
                    message = f"there is an image {image}: choose another name, or remove it first"
                    raise MONAILabelException(MONAILabelError.INVALID_INPUT, message)
                return add(image, file, info)

        store.save_label, store.add_image = save_checked, add_checked
        return store

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Segment an image.

        Args:
            request: the settings; `image` is a name in the datastore, or the path of a file that was sent.
            datastore: the images, and where a label is stored if `save_label` is set; None for the app's own.

        Returns:
            MONAI Label's answer.

        Raises:
            ImageNotFoundException: if there is no image of the name.
        """
        store, image, tag = datastore or self.datastore(), request["image"], request.get("label_tag", "original")
        if request.get("model") not in self._infers:
            return super().infer(request, store)  # which says so
        is_sent = self.is_received(image)
        path = image if is_sent else self.image_file(image, store)
        versions = self._infers[request["model"]].versions()
        answer = super().infer(request | {"image": path}, store)
        if not is_sent:
            self.note(image, request["model"], answer["params"].get(PREDICTIONS, {}), versions, store)
        if request.get("save_label") and not is_sent and answer["file"]:
            notes = {"model": request["model"], "params": answer["params"]}
            answer |= {"label": store.save_label(image, answer["file"], tag, notes), "tag": tag}
        return answer

    def note(
        self, image: str, model: str, predictions: Mapping[str, Any], versions: Mapping[str, str], datastore: Datastore
    ) -> None:
        """Note what an inference said about an image in a datastore, where it survives a restart.

        Args:
            image: its name.
            model: its name.
            predictions: as `InferTask.run_inferer` returns them; if there are none, earlier ones stay.
            versions: as `InferTask.versions`, before the inference.
            datastore: where the image is.
        """
        if predictions:
            noted = {name: {"value": value, "of": versions[name]} for name, value in predictions.items()}
            of_others = datastore.get_image_info(image).get(PREDICTIONS, {})
            datastore.update_image_info(image, {PREDICTIONS: of_others | {model: noted}})

    def is_received(self, image: str) -> bool:
        """Return whether an image's name is the path of a file that the server itself has stored."""
        path = Path(image)
        if not path.is_absolute() or ".." in path.parts or not path.exists():
            return False
        sessions = self.sessions()
        of_session = sessions is not None and path.is_relative_to(sessions.store_path)
        return of_session or path.parent == Path(tempfile.gettempdir())

    def check_readable(self, image: str) -> None:
        """Raise MONAILabelException of INVALID_INPUT for the path of an image that no bundle can segment."""
        reasons = [task.fault(image) for task in self._infers.values()]
        if all(reasons):
            raise MONAILabelException(MONAILabelError.INVALID_INPUT, str(reasons[0]))

    def check_place(self, path: Path) -> None:
        """Raise MONAILabelException of INVALID_INPUT for a path that a link leads out of the studies."""
        files = [path, *path.parent.glob(f"{glob.escape(path.name)}.*")]
        if not all(file.resolve().is_relative_to(Path(self.studies).resolve()) for file in files):
            message = f"a link of {path.name} leads out of the studies: expected a file, or a link inside them"
            raise MONAILabelException(MONAILabelError.INVALID_INPUT, message)

    def image_file(self, image: str, datastore: Datastore) -> str:
        """Return the path of an image.

        Args:
            image: its name.
            datastore: where to look.

        Raises:
            ImageNotFoundException: if there is none.
            MONAILabelException: of INVALID_INPUT, if it is a link that leads out of the studies.
        """
        try:
            file = datastore.get_image_uri(image)
        except (IndexError, requests.RequestException):  # a DICOMweb server's
            file = ""
        if not file:
            raise ImageNotFoundException(f"there is no image {image}: GET /datastore/?output=all lists those that are")
        if not isinstance(datastore, DICOMWebDatastore):
            self.check_place(Path(file))
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


def worth_of(bundle: str) -> dict[str, Any]:
    """Return what a bundle is worth beside the others; nothing of one for a user's own data.

    Args:
        bundle: its name.

    Returns:
        a sentence as `description`, `dice_without_labels` in percent, and `relative_seconds`.
    """
    if bundle not in WORTH:
        return {}
    purpose, dice, seconds = WORTH[bundle]
    sentence = f"{purpose[0].upper()}{purpose[1:]}: mean Dice {dice} % on real hearts without a label, "
    sentence += f"{seconds:g} times the seconds of the fastest."
    return {"description": sentence, "dice_without_labels": dice, "relative_seconds": seconds}


def _seconds_per_dice(bundle: str) -> float:
    """Return what bundles are sorted by; those for a user's own data come first."""
    _, dice, seconds = WORTH.get(bundle, ("", 1.0, 0.0))
    return seconds / dice


def _takes_clicks(bundle: str) -> bool:
    """Return whether the segmentation of volumes by a bundle in a folder can be corrected by clicks."""
    from components.networks.click_networks import has_own_corrector
    from components.sam.encoders import SHIPPED

    inference, correct = (Path(bundle, "configs", name) for name in ("inference.json", CORRECT))
    if not correct.is_file():
        return False
    model_type = json.loads(inference.read_text()).get("model_type")
    brought = json.loads(correct.read_text()).get("click_encoder_def", {}).get("shipped")
    return brought in SHIPPED or (model_type is not None and has_own_corrector(model_type))


def _and_refreshes(method: Callable, store: LocalDatastore) -> Callable:
    """Return a method of a store after which its list is that of the folder."""

    def followed(*arguments: Any, **options: Any) -> Any:
        result = method(*arguments, **options)
        store.refresh()
        return result

    return followed


def _one_at_a_time(method: Callable, lock: threading.RLock) -> Callable:
    """Return a method that waits for a lock."""

    def locked(*arguments: Any, **options: Any) -> Any:
        with lock:
            return method(*arguments, **options)

    return locked


def _reason(error: Exception, names: Mapping[str, str]) -> str | None:
    """Return the sentence of an error that a bundle's `components` raise, with names for paths; None for others."""
    from components.base.errors import summarize_traceback  # of the bundles, on the path only once they are read

    sentence, is_own = summarize_traceback(error)
    for path, name in names.items():
        sentence = sentence.replace(path, name)
    sentence = re.sub(r"something that begins with b(['\"]).*?\1(?=: )", "of another kind", sentence)
    return sentence if is_own else None
