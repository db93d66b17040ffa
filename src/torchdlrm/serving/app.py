"""The routes of the HTTP server.

In: a `Service`.  Out: an ASGI app.  Bodies are read by hand, within limits, and parsed by orjson: a model of every row,
checked cell by cell in Python, would take longer than predicting it.  What the routes take and answer stands in
`openapi.py`.
"""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from torchdlrm import __version__
from torchdlrm.errors import TorchDLRMError
from torchdlrm.serving.bodies import read_body
from torchdlrm.serving.exchange import IS_GONE
from torchdlrm.serving.metrics import CONTENT_TYPE
from torchdlrm.serving.open_inference.columns import model_metadata
from torchdlrm.serving.open_inference.http import EXTENSIONS, HEADER_LENGTH, InferRequest, format_infer, parse_infer
from torchdlrm.serving.openapi import document
from torchdlrm.serving.page_routes import page_routes
from torchdlrm.serving.refusals import RefusedRequest
from torchdlrm.serving.request_middleware import REQUEST_ID, RequestMiddleware, refusal
from torchdlrm.serving.row_routes import read_rows
from torchdlrm.serving.service import Service, off_loop_if_large

MODEL = "/v2/models/{name}"
VERSION = MODEL + "/versions/{version}"


def build_app(service: Service) -> RequestMiddleware:
    """Everything that is answered over HTTP."""

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedRequest)
        return refusal(error)

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _json({"error": error.detail}, error.status_code, dict(error.headers or {}))

    async def unforeseen(_: Request, __: Exception) -> Response:
        return _json({"error": "the server failed; its log says why"}, HTTPStatus.INTERNAL_SERVER_ERROR)

    app = Starlette(
        routes=[*_row_routes(service), *_open_inference(service), *_operators(service), *page_routes()],
        exception_handlers={RefusedRequest: refused, HTTPException: http_error, Exception: unforeseen},
    )
    app.router.redirect_slashes = False
    return RequestMiddleware(app, service)


def _row_routes(service: Service) -> list[Route]:
    async def predict(request: Request) -> Response:
        body, started_s = await _body(request, service)
        served = service.bundles.current
        max_rows = service.options.max_rows_per_request

        rows, num_bytes = await off_loop_if_large(lambda: read_rows(body, served.schema, max_rows), len(body))
        answer = await service.predict(
            served,
            rows,
            num_bytes=num_bytes,
            request_id=request.scope[REQUEST_ID],
            started_s=started_s,
            is_gone=request.scope.get(IS_GONE, _never),
        )
        return _json({"predictions": answer.probabilities, "model": service.name, "version": served.version})

    async def openapi(_: Request) -> Response:
        return _json(document(service))

    async def schema(_: Request) -> Response:
        return _json(service.describe())

    return [
        _route("/predict", predict, "POST"),
        _route("/schema", schema, "GET"),
        _route("/openapi.json", openapi, "GET"),
    ]


def _open_inference(service: Service) -> list[Route]:
    async def server(_: Request) -> Response:
        return _json({"name": "torchdlrm", "version": __version__, "extensions": EXTENSIONS})

    async def live(_: Request) -> Response:
        return _state(service.is_live, "live")

    async def ready(_: Request) -> Response:
        return _state(service.is_ready, "ready")

    async def metadata(request: Request) -> Response:
        served = service.check_model(**request.path_params)
        return _json(model_metadata(service.name, served.version, served.schema))

    async def model_ready(request: Request) -> Response:
        served = service.check_model(**request.path_params)
        if not service.is_ready:
            return _state(service.is_ready, "ready")
        return _json({"name": service.name, "version": served.version, "ready": True})

    async def infer(request: Request) -> Response:
        service.check_model(**request.path_params)
        body, started_s = await _body(request, service)
        served = service.check_model(**request.path_params)
        max_rows = service.options.max_rows_per_request

        def parse() -> InferRequest:
            return parse_infer(body, request.headers.get(HEADER_LENGTH), served.schema, max_rows)

        asked = await off_loop_if_large(parse, len(body))
        answer = await service.predict(
            served,
            asked.rows,
            num_bytes=len(body),
            request_id=request.scope[REQUEST_ID],
            started_s=started_s,
            timeout_us=asked.timeout_us,
            is_gone=request.scope.get(IS_GONE, _never),
        )
        content, headers = format_infer(service.name, served.version, asked, answer.probabilities)
        return Response(content, headers=headers)

    routes = [
        _route("/v2", server, "GET"),
        _route("/v2/health/live", live, "GET"),
        _route("/v2/health/ready", ready, "GET"),
    ]
    for prefix in (MODEL, VERSION):
        routes += [
            _route(prefix, metadata, "GET"),
            _route(prefix + "/ready", model_ready, "GET"),
            _route(prefix + "/infer", infer, "POST"),
        ]
    return routes


def _operators(service: Service) -> list[Route]:
    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def reload(_: Request) -> Response:
        if not service.keys:
            msg = "swapping over HTTP needs an API key; start the server with one, or send it SIGHUP"
            raise RefusedRequest(HTTPStatus.FORBIDDEN, msg)
        try:
            outcome = await service.reload()
        except TorchDLRMError as error:
            msg = "the bundle cannot be served, and the one before still is; the server's log says why"
            raise RefusedRequest(HTTPStatus.CONFLICT, msg) from error
        service.tell_others()
        return _json(outcome)

    return [_route("/metrics", metrics, "GET"), _route("/admin/reload", reload, "POST")]


async def _body(request: Request, service: Service) -> tuple[bytes, float]:
    service.batcher.check_room()
    return await read_body(request, service.options, service.uploads)


def _never() -> bool:
    return False


def _state(is_so: bool, what: str) -> Response:  # noqa: FBT001 - it is the value that is told
    if is_so:
        return _json({what: True})
    return _json({what: False, "error": f"not {what}"}, HTTPStatus.SERVICE_UNAVAILABLE)


def _json(content: Any, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Response:
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, headers, media_type="application/json")


def _route(path: str, answer: Callable[[Request], Awaitable[Response]], method: str) -> Route:
    return Route(path, answer, methods=[method])
