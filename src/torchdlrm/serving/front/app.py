"""Answers HTTP requests: who may ask, how many at a time, the routes, metrics, the log.

In: a `Service`.  Out: an ASGI app.  Refusing costs next to nothing here: before routing, and before the body is read,
so that a server with too much to do can say so to every client that it cannot answer.  Bodies are read by hand, within
limits, and parsed by orjson: a model of every row, checked cell by cell in Python, would take longer than predicting
it.  What the routes take and answer is described in `openapi.py`.
"""

import logging
import time
from functools import partial
from http import HTTPStatus
from typing import Any, Final

import numpy as np
import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from torchdlrm import __version__
from torchdlrm.errors import TorchDLRMError, shown
from torchdlrm.prediction.explain import METHOD
from torchdlrm.prediction.predictor import Predictor, Rows
from torchdlrm.serving.front.access import AllowedHosts, ApiKeys
from torchdlrm.serving.front.bodies import off_loop_if_large, read_body
from torchdlrm.serving.front.exchange import ARRIVED, IS_GONE
from torchdlrm.serving.front.open_inference.columns import model_metadata
from torchdlrm.serving.front.open_inference.http import EXTENSIONS, HEADER_LENGTH, format_infer, parse_infer
from torchdlrm.serving.front.openapi import document
from torchdlrm.serving.front.rows import describe, read_left_out, read_rows
from torchdlrm.serving.page.routes import page_routes
from torchdlrm.serving.service.batcher import Answer, PredictionRequest
from torchdlrm.serving.service.bundles import identity_of
from torchdlrm.serving.service.metrics import CONTENT_TYPE
from torchdlrm.serving.service.refusals import RefusedRequest, overloaded
from torchdlrm.serving.service.service import Service

_REQUEST_ID: Final = "torchdlrm.request_id"  # in a request's scope


def build_app(service: Service) -> ASGIApp:
    """Build the app that answers over HTTP."""
    answers = _Answers(service)
    routes = [
        Route("/predict", answers.predict, methods=["POST"]),
        Route("/explain", answers.explain, methods=["POST"]),
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
    return RequestMiddleware(Router([*routes, *page_routes()], redirect_slashes=False), service)


class RequestMiddleware:
    """An ASGI app in front of another, which refuses, counts and logs requests."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._num_under_way = 0
        options = service.options
        self._keys = ApiKeys(options.api_keys)
        self._hosts = None if self._keys else AllowedHosts(options.host, options.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = scope.setdefault(ARRIVED, time.perf_counter())
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = self._service.request_id(headers.get(b"x-request-id", b""))
        scope[_REQUEST_ID] = request_id
        scope["app"] = self  # for it the router raises what it cannot route
        status = 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if self._service.is_draining:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        self._num_under_way += 1
        try:
            self._check(scope["method"], scope["path"], headers)
            await self._app(scope, receive, note)
        except (RefusedRequest, HTTPException) as error:
            refusal = _refusal(error, scope["method"], scope["path"])
            await refusal(scope, receive, note)
        except Exception:
            if not status:
                failed = _json({"error": "the server failed; its log says why"}, HTTPStatus.INTERNAL_SERVER_ERROR)
                await failed(scope, receive, note)
            raise
        finally:
            self._num_under_way -= 1
            self._note_end(scope, status, time.perf_counter() - started_s, request_id)

    def _check(self, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        """Refuse a request that its client may not make, or that is one too many."""
        if self._is_health(path):
            return
        is_open = path == "/" or path.startswith("/page/")
        if self._hosts is not None:
            msg = self._hosts.refusal(method, headers, is_for_all=is_open)
            if msg is not None:
                raise RefusedRequest(HTTPStatus.FORBIDDEN, msg)
        limit = self._service.options.max_concurrent_requests
        if self._num_under_way - self._service.uploads.num_bodies > limit:
            raise overloaded(f"{limit:,} requests are being answered, and no more are taken meanwhile; try again later")
        if not (is_open or self._keys.accept(headers)):
            msg = "this needs an API key; send the header 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            raise RefusedRequest(HTTPStatus.UNAUTHORIZED, msg)

    def _is_health(self, path: str) -> bool:
        """Tell whether a path asks for health alone, which needs no key and is answered however much there is to do."""
        if path.startswith("/v2/health/"):
            return True
        model = f"/v2/models/{self._service.name}"
        return path in {f"{model}/ready", f"{model}/versions/{self._service.bundles.current.version}/ready"}

    def _note_end(self, scope: Scope, status: int, total_s: float, request_id: str) -> None:
        method, path, client = scope["method"], scope["path"], scope["client"][0] if scope.get("client") else None
        level = logging.ERROR if status == HTTPStatus.INTERNAL_SERVER_ERROR else logging.INFO
        if self._is_health(path):
            level = logging.DEBUG
        route = getattr(scope.get("route"), "path", "none")
        fields = {"request_id": request_id, "method": method, "path": path, "client": client}
        self._service.request_done(level, route, status, total_s, **fields)


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
        found: dict[str, Any] = {"predictions": answer.probabilities}
        if len(served.labels) > 1:
            labels = served.schema.by_label(answer.probabilities)
            found = {"predictions": labels[served.labels[0]], "labels": labels}
        return _json({**found, "model": service.name, **identity_of(served.bundle)})

    async def explain(self, request: Request) -> Response:
        service = self._service
        body, started_s = await self._body(request)
        served, max_rows = service.bundles.current, service.options.max_rows_per_request
        read = partial(read_left_out, body, served.schema, max_rows, request.query_params.get("label"))
        left_out, size = await off_loop_if_large(read, len(body) * len(served.schema.features))
        # One row may need more rows than a request may have.
        parts = (left_out.rows[at : at + max_rows] for at in range(0, max(1, len(left_out.rows)), max_rows))
        answers = [await self._predicted(request, served, part, size, started_s, is_reported=False) for part in parts]
        pairs = zip(*((one.probabilities, one.logits) for one in answers), strict=True)
        found = [row.as_dict() for row in left_out.explained(*map(np.concatenate, pairs))]
        about = {"model": service.name, **identity_of(served.bundle)}
        return _json({"explanations": found, "method": METHOD, **about})

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
        manifest = served.bundle.manifest
        maps = (f"{name}: {of}" if served.labels[1:] else str(of) for name, of in manifest.recalibrations.items())
        about = {"period": manifest.period, "recalibration": "; ".join(maps) or None}
        given = {name: value for name, value in about.items() if value is not None}
        return _json(model_metadata(self._service.name, served.version, served.schema) | given)

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
        *,
        is_reported: bool = True,
    ) -> Answer:
        is_gone = request.scope.get(IS_GONE, lambda: False)
        request_id = request.scope[_REQUEST_ID]
        return await self._service.predict(
            PredictionRequest(served, rows, num_bytes, request_id, started_s, is_gone, timeout_us, is_reported)
        )


def _state(is_so: bool, what: str) -> Response:  # noqa: FBT001 - it is the value that is shown
    if is_so:
        return _json({what: True})
    return _json({what: False, "error": f"not {what}"}, HTTPStatus.SERVICE_UNAVAILABLE)


def _json(content: Any, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Response:
    """Make an answer in JSON."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, headers, media_type="application/json")


def _refusal(error: RefusedRequest | HTTPException, method: str, path: str) -> Response:
    """Make the answer to a request that is refused, or for which there is no route."""
    if isinstance(error, HTTPException):
        message, headers = error.detail, dict(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            message = f"{shown(path)} takes {headers['Allow']}, not {method}; GET /openapi.json describes how"
        elif error.status_code == HTTPStatus.NOT_FOUND:
            there_is = "GET /openapi.json describes what there is, POST /predict predicts"
            message = f"{shown(path)}: there is nothing here; {there_is}"
        return _json({"error": message}, error.status_code, headers)
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return _json({"error": error.message}, error.status, headers)
