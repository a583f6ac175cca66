"""The application: paths, and what stands behind each. FastAPI documents it at ``/openapi.json``."""

# No ``from __future__ import annotations``: FastAPI reads the annotations of functions that stand inside another.

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from convscale._version import __version__
from convscale.errors import UserError
from convscale.serve import documented
from convscale.serve.answering import Answering, read_body
from convscale.serve.guard import LEFT, ClientLeft, Guard, Guarded
from convscale.serve.pictures import pictures_of
from convscale.serve.protocol import Problem, model_metadata, server_metadata

if TYPE_CHECKING:
    from fastapi import FastAPI

TOP = 5
"""Labels of an answer, where nothing else is asked for."""
_POLICY = "default-src 'none'; img-src blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


def build(answering: Answering) -> Guard:
    """The whole application, guarded."""
    from fastapi import FastAPI

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(answering.watch())
        try:
            yield
        finally:
            watching.cancel()
            try:
                with suppress(asyncio.CancelledError):
                    await watching
            finally:  # whatever ended it: what was accepted is answered
                await asyncio.get_running_loop().run_in_executor(None, answering.close)

    app = FastAPI(title="convscale", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    guard = Guard(app, answering.settings, answering.metrics, answering.log, answering)
    _refusals(app)
    _health(app, guard, answering)
    _models(app, answering)
    _inference(app, answering)
    _repository(app, answering)
    _page(app, answering)
    return guard


def guarded(request: Any) -> Guarded:
    """What the guard knows of a request."""
    return request.scope["state"]["guarded"]


def _refusals(app: "FastAPI") -> None:
    """Every error is one line of JSON."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, Response

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> Response:
        status, headers, body = await guarded(request).refusal(error)
        return Response(body, status, headers)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def validation(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"}, 400)

    @app.exception_handler(ClientLeft)
    async def left(_: Request, __: ClientLeft) -> Response:
        return Response(status_code=LEFT)

    @app.exception_handler(Exception)
    async def ours(_: Request, __: Exception) -> Response:
        return JSONResponse({"error": "the server failed; its log says why"}, 500)


def _health(app: "FastAPI", guard: Guard, answering: Answering) -> None:
    """Whether it lives, whether it takes work, and what it counts."""
    from fastapi import Request
    from fastapi.responses import JSONResponse, Response

    @app.get("/v2/health/live", tags=["protocol"], responses=documented.errors())
    async def live(request: Request) -> dict[str, bool]:
        """The server runs."""
        guarded(request).told.endpoint = "health"
        return {"live": True}

    @app.get("/v2/health/ready", tags=["protocol"], responses=documented.errors(503))
    async def ready(request: Request) -> JSONResponse:
        """All models answer; not while the server is stopping."""
        guarded(request).told.endpoint = "health"
        if guard.draining:
            raise Problem(503, "the server is stopping", {"retry-after": "1"})
        return JSONResponse({"ready": True})

    @app.get("/metrics", tags=["operation"], response_class=Response, responses=_text("text/plain", 401))
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        guarded(request).told.endpoint = "metrics"
        body, kind = answering.metrics.text()
        return Response(body, headers={"content-type": kind})


def _text(kind: str, *statuses: int) -> dict[int | str, dict[str, Any]]:
    found = documented.errors(*statuses)
    return {200: {"description": "Text.", "content": {kind: {"schema": {"type": "string"}}}}, **found}


def _models(app: "FastAPI", answering: Answering) -> None:
    """What is served."""
    from fastapi import Request

    @app.get("/v2", tags=["protocol"], responses={200: documented.SERVER, **documented.errors()})
    async def server(request: Request) -> dict[str, object]:
        """The server's name and extensions."""
        guarded(request).told.endpoint = "metadata"
        return server_metadata(__version__)

    async def model(request: Request, name: str, version: str | None = None) -> dict[str, object]:
        """What a model takes and gives."""
        guarded(request).told.endpoint = "metadata"
        return model_metadata(answering.version(name, version).takes)

    async def model_ready(request: Request, name: str, version: str | None = None) -> dict[str, object]:
        """A model answers."""
        guarded(request).told.endpoint = "health"
        return {"name": answering.version(name, version).takes.name, "ready": True}

    described = {200: documented.MODEL, **documented.errors(404)}
    for path in _with_version("/v2/models/{name}"):
        app.get(path, tags=["protocol"], responses=described)(model)
        app.get(f"{path}/ready", tags=["protocol"], responses=documented.errors(404))(model_ready)


def _with_version(path: str) -> tuple[str, str]:
    return path, f"{path}/versions/{{version}}"


def _inference(app: "FastAPI", answering: Answering) -> None:
    """Tensors and pictures."""
    from fastapi import Query, Request
    from fastapi.responses import JSONResponse, Response

    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        """Probabilities of a tensor of images."""
        # Described here; the guard hands such requests on before they come so far.
        one = guarded(request)
        one.told.endpoint = "infer"
        body, headers = await answering.infer(one, request.headers, name, version)
        return Response(body, headers=headers)

    async def classify(
        request: Request, name: str, version: str | None = None, top: int = Query(TOP, ge=1, le=1_000)
    ) -> JSONResponse:
        """Labels with probabilities of pictures: one's bytes, a form of several, or a list in base64."""
        one = guarded(request)
        one.told.endpoint = "classify"
        model = answering.version(name, version)
        one.told.model = name
        with model.batcher.coming():
            pictures, several = await pictures_of(one, request, answering.settings.limits.pictures)
            images = await answering.decode(one, pictures, model)
        found, model = await answering.classify(one, images, model, top, named=version is not None)
        if not several and "error" in found[0]:
            raise Problem(400, str(found[0]["error"]))
        said = {"model_name": model.takes.name, "model_version": model.takes.version, "answers": found}
        return JSONResponse(said)

    tensors = {200: documented.INFERRED, **documented.errors(400, 404, 408, 413, 415, 503, 504)}
    labels = {200: documented.CLASSIFIED, **documented.errors(400, 404, 408, 413, 415, 503, 504)}
    for path in _with_version("/v2/models/{name}"):
        app.post(
            f"{path}/infer",
            tags=["protocol"],
            response_class=Response,
            responses=tensors,
            openapi_extra={"requestBody": documented.INFER_BODY},
        )(infer)
        app.post(
            f"{path}/classify",
            tags=["pictures"],
            responses=labels,
            openapi_extra={"requestBody": documented.CLASSIFY_BODY},
        )(classify)


def _repository(app: "FastAPI", answering: Answering) -> None:
    """Triton's extension for a model repository: what is there, and taking up a new version."""
    from fastapi import Request
    from fastapi.responses import JSONResponse

    @app.post("/v2/repository/index", tags=["repository"], responses=documented.errors(408, 413))
    async def index(request: Request) -> list[dict[str, str]]:
        """All models."""
        one = guarded(request)
        one.told.endpoint = "repository"
        await read_body(one)
        return [
            {"name": name, "version": model.current.takes.version, "state": "READY", "reason": ""}
            for name, model in answering.models.all.items()
        ]

    @app.post("/v2/repository/models/{name}/load", tags=["repository"], responses=documented.errors(404, 408, 409, 413))
    async def load(request: Request, name: str) -> JSONResponse:
        """Take up the newest version in the model's folder, if it is good."""
        one = guarded(request)
        one.told.endpoint = "repository"
        answering.version(name, None)
        await read_body(one)
        try:
            await answering.load(name)
        except UserError as error:
            raise Problem(409, f"the new version of {name!r} is refused, and the log says why") from error
        return JSONResponse({})


def _page(app: "FastAPI", answering: Answering) -> None:
    """A page to try it."""
    from fastapi import Request
    from fastapi.responses import HTMLResponse, Response

    text = (files("convscale.serve") / "page.html").read_text(encoding="utf-8")
    page = text.replace("<body>", _body_tag(list(answering.models.all), asks=answering.settings.token is not None))

    @app.get("/", tags=["pictures"], response_class=HTMLResponse, responses=_text("text/html"))
    async def start(request: Request) -> Response:
        """A page that classifies a dropped picture."""
        guarded(request).told.endpoint = "page"
        return HTMLResponse(page, headers={"content-security-policy": _POLICY})


def _body_tag(names: Sequence[str], *, asks: bool) -> str:
    """Names are of letters, digits, ``_``, ``.`` and ``-`` alone."""
    return f"<body data-models='{json.dumps(list(names))}' data-token='{'yes' if asks else 'no'}'>"
