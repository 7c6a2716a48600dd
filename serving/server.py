"""MONAI Label's server with what its endpoints leave out: reasons for refusals, and an end to what it has started.

`python -m serving` names it as MONAI Label's `--uvicorn_app`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from monailabel.app import app as monai_label
from monailabel.config import settings
from monailabel.endpoints.train import run_model
from monailabel.endpoints.user.auth import RBAC
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.async_tasks.utils import background_executors, stop_background_task


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Run MONAI Label's own start, and at the end stop the processes that train or segment in the background."""
    async with monai_label.router.lifespan_context(monai_label):
        yield
    for method, executor in background_executors.items():
        executor.shutdown(wait=False, cancel_futures=True)
        stop_background_task(method)


async def refuse(_: Request, error: Exception) -> JSONResponse:
    """Answer an error of MONAI Label's with its sentence: 404 for what is not there, 422 for what cannot be used."""
    assert isinstance(error, MONAILabelException)
    if isinstance(error, ImageNotFoundException | LabelNotFoundException):
        status = 404
    else:
        status = 422 if error.error == MONAILabelError.INVALID_INPUT else 500
    return JSONResponse({"detail": error.msg}, status_code=status)


app = FastAPI(lifespan=lifespan, openapi_url=None, middleware=monai_label.user_middleware)
for server in (app, monai_label):
    server.add_exception_handler(MONAILabelException, refuse)


@app.post("/train/{model}", dependencies=[Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_ADMIN))])
async def train(
    model: str, params: dict[str, Any] | None = None, run_sync: bool = False, enqueue: bool = False
) -> dict[str, Any]:
    """Train as MONAI Label does, and say which labels are left out and why.

    Args:
        model: name of a bundle.
        params: settings of the training.
        run_sync: whether to answer when the training has ended.
        enqueue: whether to wait for one that runs.

    Returns:
        MONAI Label's answer, with `left_out`: reasons by the label's file name.
    """
    instance = app_instance()
    trainer = instance._trainers.get(model)
    if trainer is None:
        expected = ", ".join(instance._trainers)
        message = f"there is no model {model} to train: expected one of {expected}"
        raise MONAILabelException(MONAILabelError.INVALID_INPUT, message)
    _, left_out = trainer.sorted_out(instance.datastore())
    answer = run_model(model, params, run_sync, enqueue)
    answer["left_out"] = left_out
    return answer


app.mount("/", monai_label)
