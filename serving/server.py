"""MONAI Label's server: its routes for Slicer and OHIF, each with what it accepts, and no others.

`python -m serving` passes it to MONAI Label as `--uvicorn_app`. MONAI Label's own functions answer. They get names of
images and labels that are stored, settings that `/info/` offers, and files under names of the server's own. They run in
threads, so that one that takes long does not keep others waiting. What computes in this process does so one at a time.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

import anyio
import anyio.to_thread
from fastapi import BackgroundTasks, Depends, FastAPI, File, Form, HTTPException, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.middleware import Middleware
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import OAuth2PasswordRequestForm
from monailabel.app import app as monai_label
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.endpoints import activelearning, batch_infer, datastore, login, ohif, proxy, session
from monailabel.endpoints import infer as inference
from monailabel.endpoints import train as training
from monailabel.endpoints.user import auth
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks.utils import background_executors, stop_background_task
from monailabel.utils.others.generic import get_mime_type, remove_file
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.requests import (
    FOR_BATCHES,
    FOR_INFERENCE,
    FOR_SAMPLES,
    FOR_TRAINING,
    TAG,
    RefusalError,
    check_settings,
    ending_of,
    is_authorized,
    is_below,
    is_dicomweb_query,
    is_uid,
    own_hosts,
    parse_info,
    parse_object,
    plain_name,
    refuse_page,
)

TOKEN = os.environ.get("SERVING_TOKEN", "")
ORIGINS = [origin for origin in os.environ.get("SERVING_ORIGINS", "").split(",") if origin]
OHIF = Path(ohif.__file__).parent / "static/ohif"
COMPUTING = anyio.CapacityLimiter(1)
STUDIES_REMOTE = ("http://", "https://")

_Answer = TypeVar("_Answer")
_Image = Annotated[str, Query(min_length=1, max_length=200)]
_Tag = Annotated[str, Query(pattern=TAG)]
_Settings = dict[str, Any] | None


def _role(name: str) -> Any:
    return Depends(RBAC(name))


_User = Annotated[User, _role(settings.MONAI_LABEL_AUTH_ROLE_USER)]
_Annotator = Annotated[User, _role(settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR)]
_Admin = Annotated[User, _role(settings.MONAI_LABEL_AUTH_ROLE_ADMIN)]


class Gate:
    """Refuses pages of other sites, and with a token those who do not have it.

    Args:
        app: answers the others.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.hosts = own_hosts(os.environ.get("SERVING_HOST", "127.0.0.1"), ORIGINS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        reason = refuse_page(headers.get("host", ""), headers.get("origin"), self.hosts, ORIGINS)
        if reason:
            await JSONResponse({"detail": reason}, 403)(scope, receive, send)
        elif TOKEN and scope["path"] not in ("/auth/", "/auth/token") and not self._is_authorized(headers):
            challenge = {"WWW-Authenticate": 'Basic realm="any user, and the token as password"'}
            await JSONResponse({"detail": "a token is needed"}, 401, challenge)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    @staticmethod
    def _is_authorized(headers: Headers) -> bool:
        return is_authorized(headers.get("authorization", ""), TOKEN)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Run MONAI Label's own start, and at the end stop the processes that train or segment in the background."""
    async with monai_label.router.lifespan_context(monai_label):
        yield
    for method, executor in background_executors.items():
        executor.shutdown(wait=False, cancel_futures=True)
        stop_background_task(method)


cross_origin = Middleware(
    CORSMiddleware, allow_origins=ORIGINS, allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
)
app = FastAPI(lifespan=lifespan, openapi_url=None, middleware=[cross_origin, Middleware(Gate)])


@app.exception_handler(MONAILabelException)
async def refuse(_: Request, error: MONAILabelException) -> JSONResponse:
    """Answer with the message of MONAI Label's error: 404 for missing images and labels, 422 for invalid input."""
    if isinstance(error, ImageNotFoundException | LabelNotFoundException):
        status = 404
    else:
        status = 422 if error.error == MONAILabelError.INVALID_INPUT else 500
    return JSONResponse({"detail": error.msg}, status_code=status)


@app.exception_handler(RefusalError)
async def refuse_content(_: Request, error: RefusalError) -> JSONResponse:
    """Answer 422 with the reason."""
    return JSONResponse({"detail": str(error)}, 422)


@app.exception_handler(RequestValidationError)
async def refuse_form(_: Request, error: RequestValidationError) -> JSONResponse:
    """Answer 422 with one sentence on what a parameter should be, without the value that was sent."""
    faults = [f"{'.'.join(map(str, fault['loc'][1:]))}: {fault['msg']}" for fault in error.errors()]
    return JSONResponse({"detail": "; ".join(faults)}, 422)


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


@app.get("/info/")
def info(_: _User) -> dict[str, Any]:
    """Describe the models, what they are worth, and the settings that they take."""
    return app_instance().info()


@app.post("/infer/{model}")
async def infer(
    model: str,
    background_tasks: BackgroundTasks,
    _: _User,
    image: str = "",
    session_id: UUID | Literal[""] = "",
    params: Annotated[str, Form()] = "{}",
    file: Annotated[UploadFile | None, File()] = None,
    output: inference.ResultType | None = None,
) -> Any:
    """Segment a stored image, that of a session, or one that is sent, while other requests are answered."""

    def run() -> Any:
        given = settings_for(task_of(model, app_instance()._infers), parse_object(params), FOR_INFERENCE)
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


@app.get("/batch/infer")
def batch_status(_: _User, all: bool = False, check_if_running: bool = False) -> Any:  # noqa: A002 - MONAI Label's name
    """Say how far the last inference on many images is, and which images are left out and why."""
    status = batch_infer.status(all, check_if_running)
    (status[-1] if all else status)["left_out"] = app_instance()._batch_infer.left_out()
    return status


@app.post("/batch/infer/{model}")
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


@app.delete("/batch/infer")
def stop_batch(_: _Admin) -> Any:
    """Stop the inference on many images."""
    return batch_infer.stop()


@app.get("/train/")
def train_status(_: _User, all: bool = False, check_if_running: bool = False) -> Any:  # noqa: A002 - MONAI Label's name
    """Say how far the last training is."""
    return training.status(all, check_if_running)


@app.post("/train/{model}")
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


@app.post("/train/")
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


@app.delete("/train/")
def stop_training(_: _Admin) -> Any:
    """Stop the training."""
    return training.stop()


@app.post("/activelearning/{strategy}")
def next_sample(strategy: str, user: _User, params: _Settings = None) -> Any:
    """Choose the image to label next."""
    strategies = app_instance()._strategies
    if strategy not in strategies:
        raise RefusalError(f"there is no strategy {strategy[:100]}: expected one of {', '.join(strategies)}")
    return activelearning.sample(strategy, check_settings(params or {}, FOR_SAMPLES), user.username)


@app.get("/datastore/")
def list_datastore(_: _User, output: datastore.ResultType | None = None) -> Any:
    """List images and labels, or count them."""
    return datastore.datastore(output)


@app.put("/datastore/")
@app.put("/datastore/image")
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


@app.delete("/datastore/")
@app.delete("/datastore/image")
def remove_image(id: _Image, user: _Admin) -> Any:  # noqa: A002 - MONAI Label's name
    """Remove an image and its labels."""
    return datastore.remove_image(stored_image(id), user.username)


@app.head("/datastore/image")
def check_image(image: _Image, _: _User, check_sum: Annotated[str | None, Query(max_length=200)] = None) -> Any:
    """Answer whether an image is stored."""
    if check_sum and not re.fullmatch(r"((SHA256|SHA512|MD5):)?[0-9a-f]+", check_sum):
        raise RefusalError("check_sum is none: expected SHA256:, SHA512: or MD5: and a hexadecimal number")
    return datastore.download_image(stored_image(image), check_only=True, check_sum=check_sum)


@app.get("/datastore/image")
def download_image(image: _Image, _: _User) -> Any:
    """Send an image."""
    return datastore.download_image(stored_image(image))


@app.get("/datastore/image/info")
def image_info(image: _Image, _: _User) -> Any:
    """Return the notes on an image."""
    return datastore.get_image_info(stored_image(image))


@app.put("/datastore/image/info")
def note_on_image(image: _Image, user: _Annotator, info: Annotated[str, Form()] = "{}") -> Any:
    """Add notes on an image."""
    return datastore.update_image_info(stored_image(image), json.dumps(parse_info(info)), user.username)


@app.put("/datastore/label")
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


@app.delete("/datastore/label")
def remove_label(id: _Image, tag: _Tag, user: _Admin) -> Any:  # noqa: A002 - MONAI Label's name
    """Remove a label."""
    return datastore.remove_label(stored_label(id, tag), tag, user.username)


@app.head("/datastore/label")
def check_label(image: _Image, tag: _Tag, _: _User) -> Any:
    """Answer whether a label is stored."""
    return datastore.download_label(stored_label(image, tag), tag, check_only=True)


@app.get("/datastore/label")
def download_label(label: _Image, tag: _Tag, _: _User) -> Any:
    """Send a label."""
    return datastore.download_label(stored_label(label, tag), tag)


@app.get("/datastore/label/info")
def label_info(label: _Image, tag: _Tag, _: _User) -> Any:
    """Return the notes on a label."""
    return datastore.get_label_info(stored_label(label, tag), tag)


@app.put("/datastore/label/info")
def note_on_label(label: _Image, tag: _Tag, user: _Annotator, info: Annotated[str, Form()] = "{}") -> Any:
    """Add notes on a label."""
    return datastore.update_label_info(stored_label(label, tag), tag, json.dumps(parse_info(info)), user.username)


@app.put("/datastore/updatelabelinfo")
def note_on_label_of_reviewer(label: _Image, tag: _Tag, user: _Annotator, params: Annotated[str, Form()] = "{}") -> Any:
    """Add notes on a label, by the name that Slicer's reviewer uses."""
    return note_on_label(label, tag, user, params)


@app.get("/datastore/dataset")
def download_dataset(
    background_tasks: BackgroundTasks, _: _Annotator, limit_cases: Annotated[int | None, Query(ge=1)] = None
) -> Any:
    """Send the images that have a final label, and these labels, as a ZIP archive."""
    if not app_instance().datastore().datalist():
        raise LabelNotFoundException("there is no label of the kind final")
    archive = datastore.download_dataset(limit_cases)
    background_tasks.add_task(remove_file, str(archive.path))
    return archive


@app.get("/session/{session_id}")
def get_session(session_id: UUID, _: _User, update_ts: bool = False, image: bool = False) -> Any:
    """Describe what a client has sent, or send its image."""
    return session.get_session(str(session_id), update_ts, image)


@app.put("/session/")
def create_session(
    background_tasks: BackgroundTasks,
    _: _User,
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


@app.delete("/session/{session_id}")
def remove_session(session_id: UUID, _: _User) -> Any:
    """Remove what a client has sent."""
    return session.remove_session(str(session_id))


@app.get("/proxy/dicom/{operation}/{path:path}")
def ask_dicomweb(operation: Literal["qido", "wado"], path: str, request: Request, _: _User) -> Response:
    """Pass a query for studies, series or instances on to the DICOMweb server, as OHIF asks for it."""
    if not settings.MONAI_LABEL_STUDIES.startswith(STUDIES_REMOTE) or not is_dicomweb_query(path):
        raise HTTPException(404, "there is no such query of DICOMweb")
    return asyncio.run(proxy.proxy_dicom(request, operation, path))


@app.get("/ohif/{path:path}")
def send_ohif(path: str, _: _User) -> FileResponse:
    """Send a file of OHIF, or its page for every other path."""
    is_plain = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", path) is not None
    file = OHIF / path if is_plain and is_below(OHIF / path, OHIF) and (OHIF / path).is_file() else OHIF / "index.html"
    return FileResponse(file, media_type=get_mime_type(str(file)))


if settings.MONAI_LABEL_AUTH_ENABLE:
    # without algorithms, PyJWT takes no token at all, and MONAI Label names none
    auth.jwt.decode = functools.partial(auth.jwt.decode, algorithms=["RS256"])
    app.include_router(login.router)
elif TOKEN:

    @app.get("/auth/")
    def describe_login() -> dict[str, Any]:
        """Say that there is a login, which asks Slicer for it."""
        return {"enabled": True, "client_id": "", "realm": ""}

    @app.post("/auth/token")
    def log_in(form: Annotated[OAuth2PasswordRequestForm, Depends()]) -> dict[str, str]:
        """Return the token to a user who gives it as password."""
        if not is_authorized(f"Bearer {form.password}", TOKEN):
            raise HTTPException(401, "the password is not the server's token")
        return {"access_token": TOKEN, "token_type": "bearer"}

    @app.get("/auth/token/valid")
    def check_login(user: _User) -> dict[str, Any]:
        """Describe the user, whose token has been checked."""
        return user.model_dump()
