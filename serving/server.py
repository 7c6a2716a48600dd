"""MONAI Label's server with this project's routes: who may ask, and how errors are answered.

`python -m serving` passes it to MONAI Label as `--uvicorn_app`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware import Middleware
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from fastapi.security import OAuth2PasswordRequestForm
from monailabel.app import app as monai_label
from monailabel.config import settings
from monailabel.endpoints import login
from monailabel.endpoints.user import auth
from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)
from monailabel.utils.async_tasks.utils import background_executors, stop_background_task
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.requests import RefusalError, is_authorized, own_hosts, refuse_page
from serving.routes import AnyUser, router

TOKEN = os.environ.get("SERVING_TOKEN", "")
ORIGINS = [origin for origin in os.environ.get("SERVING_ORIGINS", "").split(",") if origin]


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
app.include_router(router)


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
    def check_login(user: AnyUser) -> dict[str, Any]:
        """Describe the user, whose token has been checked."""
        return user.model_dump()
