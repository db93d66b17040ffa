"""Defines the routes of the HTTP server.

In: a `Service`.  Out: an ASGI app.  Bodies are read by hand, within limits, and parsed by orjson: a model of every row,
checked cell by cell in Python, would take longer than predicting it.  What the routes take and answer is
described in `openapi.py`.
"""

from http import HTTPStatus
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from torchdlrm import __version__
from torchdlrm.errors import TorchDLRMError, shown
from torchdlrm.prediction.predictor import Predictor, Rows
from torchdlrm.serving.front.bodies import off_loop_if_large, read_body
from torchdlrm.serving.front.exchange import IS_GONE
from torchdlrm.serving.front.open_inference.columns import model_metadata
from torchdlrm.serving.front.open_inference.http import EXTENSIONS, HEADER_LENGTH, format_infer, parse_infer
from torchdlrm.serving.front.openapi import document
from torchdlrm.serving.front.request_middleware import REQUEST_ID, RequestMiddleware, refusal
from torchdlrm.serving.front.rows import describe, read_rows
from torchdlrm.serving.page.routes import page_routes
from torchdlrm.serving.service.batcher import Answer, PredictionRequest
from torchdlrm.serving.service.bundles import identity_of
from torchdlrm.serving.service.metrics import CONTENT_TYPE
from torchdlrm.serving.service.refusals import RefusedRequest
from torchdlrm.serving.service.service import Service


def build_app(service: Service) -> RequestMiddleware:
    """Build the app that answers over HTTP."""
    answers = _Answers(service)
    routes = [
        Route("/predict", answers.predict, methods=["POST"]),
        Route("/schema", answers.schema),
        Route("/openapi.json", answers.openapi),
        Route("/metrics", answers.metrics),
        Route("/admin/reload", answers.reload, methods=["POST"]),
        Route("/v2", answers.server),
        Route("/v2/health/live", answers.live),
        Route("/v2/health/ready", answers.ready),
    ]
    for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [
            Route(model, answers.model),
            Route(f"{model}/ready", answers.model_ready),
            Route(f"{model}/infer", answers.infer, methods=["POST"]),
        ]
    app = Starlette(
        routes=[*routes, *page_routes()],
        exception_handlers={RefusedRequest: _refused, HTTPException: _http_error, Exception: _failed},
    )
    app.router.redirect_slashes = False
    return RequestMiddleware(app, service)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedRequest)
    return refusal(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers, message, path = dict(error.headers or {}), error.detail, shown(request.scope["path"])
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{path} takes {headers['Allow']}, not {request.method}; GET /openapi.json describes how"
    elif error.status_code == HTTPStatus.NOT_FOUND:
        message = f"{path}: there is nothing here; GET /openapi.json describes what there is, POST /predict predicts"
    return _json({"error": message}, error.status_code, headers)


async def _failed(_: Request, __: Exception) -> Response:
    return _json({"error": "the server failed; its log says why"}, HTTPStatus.INTERNAL_SERVER_ERROR)


class _Answers:
    """What each route answers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def predict(self, request: Request) -> Response:
        service = self._service
        body, started_s = await self._body(request)
        served, max_rows = service.bundles.current, service.options.max_rows_per_request
        rows, num_bytes = await off_loop_if_large(lambda: read_rows(body, served.schema, max_rows), len(body))
        answer = await self._predicted(request, served, rows, num_bytes, started_s)
        return _json({"predictions": answer.probabilities, "model": service.name, **identity_of(served.bundle)})

    async def schema(self, _: Request) -> Response:
        service = self._service
        served, max_rows = service.bundles.current, service.options.max_rows_per_request
        about = {"model": service.name, **identity_of(served.bundle)}
        return _json(describe(about, served.schema, service.bundles.examples, max_rows, served.never_missing))

    async def openapi(self, _: Request) -> Response:
        return _json(document(self._service))

    async def metrics(self, _: Request) -> Response:
        return Response(self._service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def reload(self, _: Request) -> Response:
        if not self._service.options.api_keys:
            msg = "swapping over HTTP needs an API key; start the server with one, or send it SIGHUP"
            raise RefusedRequest(HTTPStatus.FORBIDDEN, msg)
        try:
            outcome = await self._service.reload()
        except TorchDLRMError as error:
            msg = "the bundle cannot be served, and the one before still is; the server's log says why"
            raise RefusedRequest(HTTPStatus.CONFLICT, msg) from error
        self._service.notify_others()
        return _json(outcome)

    async def server(self, _: Request) -> Response:
        return _json({"name": "torchdlrm", "version": __version__, "extensions": EXTENSIONS})

    async def live(self, _: Request) -> Response:
        return _state(self._service.is_live, "live")

    async def ready(self, _: Request) -> Response:
        return _state(self._service.is_ready, "ready")

    async def model(self, request: Request) -> Response:
        served = self._service.check_model(**request.path_params)
        period = {} if served.bundle.period is None else {"period": served.bundle.period}
        return _json(model_metadata(self._service.name, served.version, served.schema) | period)

    async def model_ready(self, request: Request) -> Response:
        served = self._service.check_model(**request.path_params)
        if not self._service.is_ready:
            return await self.ready(request)
        return _json({"name": self._service.name, **identity_of(served.bundle), "ready": True})

    async def infer(self, request: Request) -> Response:
        service = self._service
        service.check_model(**request.path_params)
        body, started_s = await self._body(request)
        served, max_rows = service.check_model(**request.path_params), service.options.max_rows_per_request
        header_length = request.headers.get(HEADER_LENGTH)
        asked = await off_loop_if_large(lambda: parse_infer(body, header_length, served.schema, max_rows), len(body))
        answer = await self._predicted(request, served, asked.rows, len(body), started_s, asked.timeout_us)
        content, headers = format_infer(service.name, served.bundle, asked, answer.probabilities)
        return Response(content, headers=headers)

    async def _body(self, request: Request) -> tuple[bytes, float]:
        self._service.batcher.check_room()
        return await read_body(request, self._service.options, self._service.uploads)

    async def _predicted(
        self,
        request: Request,
        served: Predictor,
        rows: Rows,
        num_bytes: int,
        started_s: float,
        timeout_us: int | None = None,
    ) -> Answer:
        is_gone = request.scope.get(IS_GONE, lambda: False)
        request_id = request.scope[REQUEST_ID]
        return await self._service.predict(
            PredictionRequest(served, rows, num_bytes, request_id, started_s, is_gone, timeout_us)
        )


def _state(is_so: bool, what: str) -> Response:  # noqa: FBT001 - it is the value that is shown
    if is_so:
        return _json({what: True})
    return _json({what: False, "error": f"not {what}"}, HTTPStatus.SERVICE_UNAVAILABLE)


def _json(content: Any, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Response:
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, headers, media_type="application/json")
