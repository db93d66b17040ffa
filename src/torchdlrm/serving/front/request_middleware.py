"""Handles every HTTP request first and last: hosts, keys, the number of concurrent requests, metrics, the log.

In: the app.  Out: the same app behind these checks.  Refusing costs next to nothing here: before routing, and before
the body is read, so that a server with too much to do can say so to every client that it cannot answer.
"""

import logging
import time
from http import HTTPStatus

import orjson
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from torchdlrm.serving.front.access import AllowedHosts, ApiKeys
from torchdlrm.serving.front.exchange import ARRIVED
from torchdlrm.serving.service.refusals import RefusedRequest, overloaded
from torchdlrm.serving.service.service import Service

REQUEST_ID = "torchdlrm.request_id"


def refusal(error: RefusedRequest) -> Response:
    """Make the answer to a request that is refused."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps({"error": error.message}), error.status, headers, media_type="application/json")


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
        scope[REQUEST_ID] = request_id
        status = 0

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if self._service.is_draining:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        refused = self._refused(scope["method"], scope["path"], headers)
        self._num_under_way += 1
        try:
            if refused is None:
                await self._app(scope, receive, note)
            else:
                await refusal(refused)(scope, receive, note)
        finally:
            self._num_under_way -= 1
            self._note_end(scope, status, time.perf_counter() - started_s, request_id)

    def _refused(self, method: str, path: str, headers: dict[bytes, bytes]) -> RefusedRequest | None:
        if self._is_health(path):
            return None
        is_open = path == "/" or path.startswith("/page/")
        if self._hosts is not None:
            msg = self._hosts.refusal(method, headers, is_for_all=is_open)
            if msg is not None:
                return RefusedRequest(HTTPStatus.FORBIDDEN, msg)
        limit = self._service.options.max_concurrent_requests
        if self._num_under_way - self._service.uploads.num_bodies >= limit:
            return overloaded(
                f"{limit:,} requests are being answered, and no more are taken meanwhile; try again later"
            )
        if is_open or self._keys.accept(headers):
            return None
        msg = "this needs an API key; send the header 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
        return RefusedRequest(HTTPStatus.UNAUTHORIZED, msg)

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
