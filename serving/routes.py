"""The server's routes for Slicer and OHIF, each with what it accepts, and no others.

MONAI Label's own functions answer. They get names of images and labels that are stored, settings that `/info/` offers,
and files under names of the server's own. They run in threads, so that one that takes long does not keep others
waiting. Computations in this process run one after the other.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

import anyio
import anyio.to_thread
from fastapi import APIRouter, BackgroundTasks, Depends, File, Form, HTTPException, Query, Request, UploadFile
from fastapi.responses import FileResponse, Response
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.endpoints import activelearning, batch_infer, datastore, ohif, proxy, session
from monailabel.endpoints import infer as inference
from monailabel.endpoints import train as training
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType
from monailabel.interfaces.tasks.infer_v2 import InferType
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.others.generic import get_mime_type, remove_file

from serving.requests import (
    FOR_BATCHES,
    FOR_INFERENCE,
    FOR_SAMPLES,
    FOR_TRAINING,
    POINTS,
    TAG,
    RefusalError,
    check_settings,
    ending_of,
    is_below,
    is_dicomweb_query,
    is_uid,
    parse_info,
    parse_object,
    plain_name,
)

OHIF = Path(ohif.__file__).parent / "static/ohif"
COMPUTING = anyio.CapacityLimiter(1)
STUDIES_REMOTE = ("http://", "https://")

router = APIRouter()

_Answer = TypeVar("_Answer")
_Image = Annotated[str, Query(min_length=1, max_length=200)]
_Tag = Annotated[str, Query(pattern=TAG)]
_Settings = dict[str, Any] | None
AnyUser = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))]
_Annotator = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR))]
_Admin = Annotated[User, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))]


async def compute(function: Callable[..., _Answer], *arguments: Any) -> _Answer:
    """Call a function in a thread, after those that compute already; the waiting ones take no thread."""
    return await anyio.to_thread.run_sync(functools.partial(function, *arguments), limiter=COMPUTING)


def task_of(model: str, tasks: dict[str, Any]) -> Any:
    """Return what a model does.

    Args:
        model: its name.
        tasks: inferences or trainings by name.

    Raises:
        MONAILabelException: of INVALID_INPUT, if there is no such model.
    """
    if model not in tasks:
        message = f"there is no model {model[:100]}: expected one of {', '.join(tasks)}"
        raise MONAILabelException(MONAILabelError.INVALID_INPUT, message)
    return tasks[model]


def settings_for(task: Any, given: dict[str, Any] | None, others: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a request, if the task offers them.

    Args:
        task: inference or training of a model.
        given: the request's settings.
        others: what clients send besides those that the task lists.

    Raises:
        RefusalError: as for `check_settings`.
    """
    config = task.config()
    devices = list(dict.fromkeys([*config["device"], *others["device"]]))
    return check_settings(given or {}, config | others | {"device": devices})


def clicks_of(task: Any) -> dict[str, Any]:
    """Return the settings for clicks that an inference takes: those of each class, and the class that is edited."""
    return dict.fromkeys(task.labels, POINTS) | {"label": ""} if task.type == InferType.DEEPEDIT else {}


def stored_image(image: str) -> str:
    """Return the name of an image, if it is stored.

    Args:
        image: the name that a request gives.

    Raises:
        ImageNotFoundException: if there is none.
        MONAILabelException: of INVALID_INPUT, if it is a link that leads out of the studies.
    """
    store = app_instance().datastore()
    is_known = is_uid(image) if isinstance(store, DICOMWebDatastore) else image in store.list_images()
    if not is_known:
        raise ImageNotFoundException(
            f"there is no image {image[:100]}: GET /datastore/?output=all lists those that are"
        )
    app_instance().image_file(image, store)
    return image


def stored_label(label: str, tag: str) -> str:
    """Return the name of a label, if it is stored.

    Args:
        label: the name that a request gives, which is its image's.
        tag: its kind, such as `final`.

    Raises:
        LabelNotFoundException: if there is none, or it is a link that leads out of the studies.
    """
    store = app_instance().datastore()
    is_remote = isinstance(store, DICOMWebDatastore)
    is_known = is_uid(label) if is_remote else label in store.list_images()
    uri = store.get_label_uri(label, tag) if is_known else ""
    if not uri or not (is_remote or is_below(Path(uri), Path(settings.MONAI_LABEL_STUDIES))):
        raise LabelNotFoundException(
            f"there is no label {label[:100]}: GET /datastore/?output=all lists those that are"
        )
    return label


@router.get("/info/")
def info(_: AnyUser) -> dict[str, Any]:
    """Describe the models, what they are worth, and the settings that they take."""
    return app_instance().info()


@router.post("/infer/{model}")
async def infer(
    model: str,
    background_tasks: BackgroundTasks,
    _: AnyUser,
    image: str = "",
    session_id: UUID | Literal[""] = "",
    params: Annotated[str, Form()] = "{}",
    file: Annotated[UploadFile | None, File()] = None,
    output: inference.ResultType | None = None,
) -> Any:
    """Segment a stored image, that of a session, or one that is sent, while other requests are answered."""

    def run() -> Any:
        task = task_of(model, app_instance()._infers)
        given = settings_for(task, parse_object(params), FOR_INFERENCE | clicks_of(task))
        if file:
            file.filename = f"image{ending_of(file.filename)}"
        elif session_id:
            session.get_session(str(session_id), update_ts=True)  # 404 if there is none
        elif not image:
            raise RefusalError("there is no image: expected image=NAME, session_id=ID, or a file in the form")
        name = stored_image(image) if image else ""
        ident = str(session_id) if session_id else ""
        return inference.run_inference(background_tasks, model, name, ident, json.dumps(given), file, None, output)

    return await compute(run)


@router.get("/batch/infer")
def batch_status(_: AnyUser, all: bool = False, check_if_running: bool = False) -> Any:  # noqa: A002 - MONAI Label's name
    """Say how far the last inference on many images is, and which images are left out and why."""
    status = batch_infer.status(all, check_if_running)
    (status[-1] if all else status)["left_out"] = app_instance()._batch_infer.left_out()
    return status


@router.post("/batch/infer/{model}")
async def batch(
    model: str,
    _: _Admin,
    params: _Settings = None,
    images: BatchInferImageType = BatchInferImageType.IMAGES_ALL,
    run_sync: bool = False,
) -> Any:
    """Segment many stored images, in a process of its own unless `run_sync` is set."""
    given = settings_for(task_of(model, app_instance()._infers), params, FOR_BATCHES)
    function = compute if run_sync else anyio.to_thread.run_sync
    return await function(batch_infer.run, model, images, given, run_sync)


@router.delete("/batch/infer")
def stop_batch(_: _Admin) -> Any:
    """Stop the inference on many images."""
    return batch_infer.stop()


@router.get("/train/")
def train_status(_: AnyUser, all: bool = False, check_if_running: bool = False) -> Any:  # noqa: A002 - MONAI Label's name
    """Say how far the last training is."""
    return training.status(all, check_if_running)


@router.post("/train/{model}")
async def train(
    model: str, _: _Admin, params: _Settings = None, run_sync: bool = False, enqueue: bool = False
) -> dict[str, Any]:
    """Train as MONAI Label does, and say which labels are left out and why.

    Args:
        model: name of a bundle.
        params: settings of the training.
        run_sync: whether to answer when the training has ended.
        enqueue: whether to wait for a running training.

    Returns:
        MONAI Label's answer, with `left_out`: reasons by the label's file name.
    """
    trainer = task_of(model, app_instance()._trainers)
    given = settings_for(trainer, params, FOR_TRAINING)

    def run() -> dict[str, Any]:
        _, left_out = trainer.sorted_out(app_instance().datastore())
        answer = training.run_model(model, given, run_sync, enqueue)
        answer["left_out"] = left_out
        return answer

    return await (compute(run) if run_sync else anyio.to_thread.run_sync(run))


@router.post("/train/")
async def train_all(_: _Admin, params: dict[str, _Settings] | None = None) -> dict[str, Any]:
    """Train several models one after the other, as OHIF asks for it.

    Args:
        params: settings by the model's name; all models if there are none.

    Returns:
        as `train`, by the model's name.
    """
    models = params or dict.fromkeys(app_instance()._trainers)
    for model, given in models.items():
        settings_for(task_of(model, app_instance()._trainers), given, FOR_TRAINING)
    return {model: await train(model, _, given, enqueue=True) for model, given in models.items()}


@router.delete("/train/")
def stop_training(_: _Admin) -> Any:
    """Stop the training."""
    return training.stop()


@router.post("/activelearning/{strategy}")
async def next_sample(strategy: str, user: AnyUser, params: _Settings = None) -> Any:
    """Choose the image to label next; choices that need inferences wait for computations."""
    strategies = app_instance()._strategies
    if strategy not in strategies:
        raise RefusalError(f"there is no strategy {strategy[:100]}: expected one of {', '.join(strategies)}")
    given = check_settings(params or {}, FOR_SAMPLES)
    function = compute if hasattr(strategies[strategy], "prediction") else anyio.to_thread.run_sync
    return await function(activelearning.sample, strategy, given, user.username)


@router.get("/datastore/")
def list_datastore(_: AnyUser, output: datastore.ResultType | None = None) -> Any:
    """List images and labels, or count them."""
    return datastore.datastore(output)


@router.put("/datastore/")
@router.put("/datastore/image")
def add_image(
    background_tasks: BackgroundTasks,
    user: _Annotator,
    file: Annotated[UploadFile, File()],
    image: str = "",
    params: Annotated[str, Form()] = "{}",
) -> Any:
    """Store an image under a new name, which is its file's unless another is given."""
    if settings.MONAI_LABEL_STUDIES.startswith(STUDIES_REMOTE):
        raise RefusalError("the images are on a DICOMweb server: expected them to be sent there")
    ending = ending_of(file.filename)
    name = plain_name(image or Path(file.filename or "").name[: -len(ending)])
    file.filename = f"image{ending}"
    return datastore.add_image(background_tasks, name, json.dumps(parse_info(params)), file, user.username)


@router.delete("/datastore/")
@router.delete("/datastore/image")
def remove_image(id: _Image, user: _Admin) -> Any:  # noqa: A002 - MONAI Label's name
    """Remove an image and its labels."""
    return datastore.remove_image(stored_image(id), user.username)


@router.head("/datastore/image")
def check_image(image: _Image, _: AnyUser, check_sum: Annotated[str | None, Query(max_length=200)] = None) -> Any:
    """Answer whether an image is stored."""
    if check_sum and not re.fullmatch(r"((SHA256|SHA512|MD5):)?[0-9a-f]+", check_sum):
        raise RefusalError("check_sum is none: expected SHA256:, SHA512: or MD5: and a hexadecimal number")
    return datastore.download_image(stored_image(image), check_only=True, check_sum=check_sum)


@router.get("/datastore/image")
def download_image(image: _Image, _: AnyUser) -> Any:
    """Send an image."""
    return datastore.download_image(stored_image(image))


@router.get("/datastore/image/info")
def image_info(image: _Image, _: AnyUser) -> Any:
    """Return the notes on an image."""
    return datastore.get_image_info(stored_image(image))


@router.put("/datastore/image/info")
def note_on_image(image: _Image, user: _Annotator, info: Annotated[str, Form()] = "{}") -> Any:
    """Add notes on an image."""
    return datastore.update_image_info(stored_image(image), json.dumps(parse_info(info)), user.username)


@router.put("/datastore/label")
def save_label(
    background_tasks: BackgroundTasks,
    image: _Image,
    user: _Annotator,
    label: Annotated[UploadFile, File()],
    params: Annotated[str, Form()] = "{}",
    tag: Annotated[str, Query(pattern=f"^$|{TAG}")] = "final",
) -> Any:
    """Store the label of an image in place of an earlier one of its kind."""
    label.filename = f"label{ending_of(label.filename, also=['.bin'])}"
    notes = json.dumps(parse_info(params))
    return datastore.save_label(background_tasks, stored_image(image), notes, tag, label, user.username)


@router.delete("/datastore/label")
def remove_label(id: _Image, tag: _Tag, user: _Admin) -> Any:  # noqa: A002 - MONAI Label's name
    """Remove a label."""
    return datastore.remove_label(stored_label(id, tag), tag, user.username)


@router.head("/datastore/label")
def check_label(image: _Image, tag: _Tag, _: AnyUser) -> Any:
    """Answer whether a label is stored."""
    return datastore.download_label(stored_label(image, tag), tag, check_only=True)


@router.get("/datastore/label")
def download_label(label: _Image, tag: _Tag, _: AnyUser) -> Any:
    """Send a label."""
    return datastore.download_label(stored_label(label, tag), tag)


@router.get("/datastore/label/info")
def label_info(label: _Image, tag: _Tag, _: AnyUser) -> Any:
    """Return the notes on a label."""
    return datastore.get_label_info(stored_label(label, tag), tag)


@router.put("/datastore/label/info")
def note_on_label(label: _Image, tag: _Tag, user: _Annotator, info: Annotated[str, Form()] = "{}") -> Any:
    """Add notes on a label."""
    return datastore.update_label_info(stored_label(label, tag), tag, json.dumps(parse_info(info)), user.username)


@router.put("/datastore/updatelabelinfo")
def note_on_label_of_reviewer(label: _Image, tag: _Tag, user: _Annotator, params: Annotated[str, Form()] = "{}") -> Any:
    """Add notes on a label, by the name that Slicer's reviewer uses."""
    return note_on_label(label, tag, user, params)


@router.get("/datastore/dataset")
def download_dataset(
    background_tasks: BackgroundTasks, _: _Annotator, limit_cases: Annotated[int | None, Query(ge=1)] = None
) -> Any:
    """Send the images that have a final label, and these labels, as a ZIP archive."""
    if not app_instance().datastore().datalist():
        raise LabelNotFoundException("there is no label of the kind final")
    archive = datastore.download_dataset(limit_cases)
    background_tasks.add_task(remove_file, str(archive.path))
    return archive


@router.get("/session/{session_id}")
def get_session(session_id: UUID, _: AnyUser, update_ts: bool = False, image: bool = False) -> Any:
    """Describe what a client has sent, or send its image."""
    return session.get_session(str(session_id), update_ts, image)


@router.put("/session/")
def create_session(
    background_tasks: BackgroundTasks,
    _: AnyUser,
    files: list[UploadFile],
    uncompress: bool = False,
    expiry: Annotated[int, Query(ge=0, le=86_400)] = 0,
) -> Any:
    """Store an image, or the files of a DICOM study, for a client's inferences."""
    if uncompress:
        raise RefusalError("archives are not unpacked: expected an image, or the files of a DICOM study")
    for number, file in enumerate(files):
        file.filename = f"{number:06d}.dcm" if len(files) > 1 else f"image{ending_of(file.filename)}"
    answer = session.create_session(background_tasks, False, expiry, files)
    try:
        app_instance().check_readable(answer["session_info"]["image"])
    except MONAILabelException:
        session.remove_session(answer["session_id"])
        raise
    return answer


@router.delete("/session/{session_id}")
def remove_session(session_id: UUID, _: AnyUser) -> Any:
    """Remove what a client has sent."""
    return session.remove_session(str(session_id))


@router.get("/proxy/dicom/{operation}/{path:path}")
def ask_dicomweb(operation: Literal["qido", "wado"], path: str, request: Request, _: AnyUser) -> Response:
    """Pass a query for studies, series or instances on to the DICOMweb server, as OHIF asks for it."""
    if not settings.MONAI_LABEL_STUDIES.startswith(STUDIES_REMOTE) or not is_dicomweb_query(path):
        raise HTTPException(404, "there is no such query of DICOMweb")
    return asyncio.run(proxy.proxy_dicom(request, operation, path))


@router.get("/ohif/{path:path}")
def send_ohif(path: str, _: AnyUser) -> FileResponse:
    """Send a file of OHIF, or its page for every other path."""
    is_plain = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", path) is not None
    file = OHIF / path if is_plain and is_below(OHIF / path, OHIF) and (OHIF / path).is_file() else OHIF / "index.html"
    return FileResponse(file, media_type=get_mime_type(str(file)))
