"""Serves the gRPC half of the Open Inference Protocol.

In: messages of `GRPCInferenceService`.  Out: the same answers as over HTTP; a request that is refused ends with the
status of gRPC that says the same as HTTP's.
"""

import asyncio
import logging
import resource
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from torchdlrm.errors import ConfigError
from torchdlrm.serving.event_log import log_event
from torchdlrm.serving.front.access import ApiKeys
from torchdlrm.serving.front.bodies import off_loop_if_large
from torchdlrm.serving.front.open_inference.grpc_methods import Context, answer, parse
from torchdlrm.serving.front.open_inference.messages import CLASSES, METHODS, PACKAGE, SERVICE
from torchdlrm.serving.service.refusals import RefusedRequest, bad_request, overloaded, too_slow
from torchdlrm.serving.service.service import Service

_STATUS = {
    HTTPStatus.BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNAUTHORIZED: grpc.StatusCode.UNAUTHENTICATED,
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.REQUEST_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
}
# Before the server stops: calls are waited for until none has arrived for so long, or at most so long.
_QUIET_S, _MAX_WAIT_S = 0.05, 0.5
_SOON_S = 0.05  # after so long a message that has not come completely counts as slow
_AGE_IN_KEEP_ALIVES = 8  # how old a connection becomes: ten minutes
_MIN_STREAMS = 256  # of a connection; its client sends a call beyond them later
_HEALTH = {"ServerLive", "ServerReady", "ModelReady"}  # without a key, and however much there is to do


class GrpcServer:
    """The server of the gRPC protocol, which stops without losing a call.

    grpc.aio sends GOAWAY only when it stops, and at that moment its core drops, as CANCELLED, every call that has
    arrived but that no handler has taken (https://github.com/grpc/grpc/issues/41785); busy clients always have some.
    So before it stops, calls are taken and kept waiting until no more arrive: then the core holds none.  Clients read
    GOAWAY before the answers, and so they send what follows elsewhere, or are refused with UNAVAILABLE.

    Args:
        service: what answers.
        address: host and port; port 0 takes a free one.
        share_port: whether other processes may listen to the same port.

    Attributes:
        port: that it has.

    Raises:
        ConfigError: the address cannot be had.
    """

    def __init__(self, service: Service, address: str, *, share_port: bool) -> None:
        self._service, self._keys = service, ApiKeys(service.options.api_keys)
        self._num_calls = self._num_under_way = 0
        self._may_answer = asyncio.Event()
        self._may_answer.set()
        options = [
            ("grpc.so_reuseport", int(share_port)),
            ("grpc.max_receive_message_length", service.options.max_body_bytes),
            ("grpc.max_metadata_size", 32 << 10),
            ("grpc.server_handshake_timeout_ms", int(1e3 * service.options.header_timeout_s)),
            ("grpc.max_connection_idle_ms", int(1e3 * service.options.keep_alive_s)),
            # An answer that its client does not take is kept as long as the connection, and there is no way to end the
            # call: so both have a limit.  The client is notified, and continues over another.
            ("grpc.max_connection_age_ms", int(1e3 * _AGE_IN_KEEP_ALIVES * service.options.keep_alive_s)),
            ("grpc.max_connection_age_grace_ms", int(2e3 * service.options.body_timeout_s)),
            ("grpc.max_concurrent_streams", max(_MIN_STREAMS, 2 * service.options.max_concurrent_requests)),
            # HTTP has the other half of the descriptors: health is asked over both.
            ("grpc.max_allowed_incoming_connections", resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2),
        ]
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
        self._server = grpc.aio.server(options=options)
        handlers = {
            # The same to a client as unary_unary; but of those grpc reads all of a message before it asks a handler.
            name: grpc.stream_unary_rpc_method_handler(
                self._guarded(name),
                response_serializer=CLASSES[f"{name}Response"].SerializeToString,
            )
            for name in METHODS
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"{PACKAGE}.{SERVICE}", handlers),))
        try:
            self.port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            msg = f"`grpc_port` {service.options.grpc_port}: cannot listen on {address}; choose another"
            raise ConfigError(msg) from error

    async def start(self) -> None:
        """Start answering."""
        await self._server.start()

    async def stop(self, timeout_s: float) -> None:
        """Answer the calls that have arrived, for up to that time, and take no more."""
        self._may_answer.clear()
        deadline_s = time.monotonic() + _MAX_WAIT_S
        num_calls = -1
        while num_calls != self._num_calls and time.monotonic() < deadline_s:
            num_calls = self._num_calls
            await asyncio.sleep(_QUIET_S)
        stopping = asyncio.create_task(self._server.stop(timeout_s))
        await asyncio.wait({stopping}, timeout=_QUIET_S)  # clients have GOAWAY then
        self._may_answer.set()
        await stopping

    def _guarded(self, name: str) -> Callable[[object, Context], Awaitable[Any]]:
        """Put a method behind the same checks, metrics and log as HTTP."""
        service = self._service

        async def guarded(_: object, context: Context) -> Any:
            self._num_calls += 1
            if not self._may_answer.is_set():
                await self._may_answer.wait()
            started_s = time.perf_counter()
            answered, refused, request_id = await self._outcome(name, context)
            context.set_trailing_metadata((("x-request-id", request_id),))
            status = HTTPStatus.OK if refused is None else refused.status
            level = logging.DEBUG if name in _HEALTH else logging.INFO
            fields = {"request_id": request_id, "method": "grpc", "path": name, "client": _client(context.peer())}
            service.request_done(level, f"grpc {name}", status, time.perf_counter() - started_s, **fields)
            if refused is not None:
                await context.abort(_STATUS.get(refused.status, grpc.StatusCode.INTERNAL), refused.message)
            return answered

        return guarded

    async def _outcome(self, name: str, context: Context) -> tuple[Any, RefusedRequest | None, str]:
        """Return the answer to a call or why there is none, and the call's request id.

        What grpc raises to end a call knows the frames that it goes through, and they know it: until the collector
        comes, nothing of them is freed.  So this is a function of its own, which they do not go through, and what it
        gives back knows nothing of the message, which may be of many megabytes.
        """
        service = self._service
        metadata = {str(key).encode(): _bytes(value) for key, value in context.invocation_metadata() or ()}
        given = metadata.get(b"x-request-id", b"")
        request_id = service.request_id(given)
        has_key = self._keys.accept(metadata)
        refused: RefusedRequest
        try:
            if not has_key and name not in _HEALTH:
                raise _no_key()
            message = await self._received(context)
            self._num_under_way += 1
            try:
                self._check_room(name)
                request = await off_loop_if_large(lambda: parse(name, message, service), len(message))
                request_id = service.request_id(given, getattr(request, "id", ""), request_id)
                return await answer(service, name, request, context, request_id), None, request_id
            finally:
                self._num_under_way -= 1
        except DecodeError:
            refused = bad_request(f"the message is no {name}Request")
        except RefusedRequest as error:
            # A client without a key must not learn, through the health methods, which models there are.
            is_told = error.status != HTTPStatus.NOT_FOUND or has_key
            refused = RefusedRequest(error.status, error.message) if is_told else _no_key()
        except Exception as error:  # noqa: BLE001 - logged; the client learns nothing of the inside
            log_event(logging.ERROR, "failure", request_id=request_id, method=name, message=repr(error))
            refused = RefusedRequest(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed; its log says why")
        return None, refused, request_id

    async def _received(self, context: Context) -> bytes:
        """Return the message of a call.

        One that does not come soon is, for the limits of what comes slowly, as large as any may be: grpc does not tell
        how much of it there is.
        """
        options, uploads, loop = self._service.options, self._service.uploads, asyncio.get_running_loop()
        try:
            with ExitStack() as until_complete:
                async with asyncio.timeout(options.body_timeout_s) as timeout:
                    is_slow = loop.call_later(
                        _SOON_S, lambda: until_complete.enter_context(uploads.track(timeout))(options.max_body_bytes)
                    )
                    try:
                        message = await context.read()
                    finally:
                        is_slow.cancel()
        except TimeoutError as error:
            raise too_slow(options.body_timeout_s) from error
        if not isinstance(message, bytes):
            raise bad_request("the call has no message")
        return message

    def _check_room(self, name: str) -> None:
        """Refuse a call, unless it asks for health, before anything is done for it, where there is too much to do."""
        if name in _HEALTH:
            return
        limit = self._service.options.max_concurrent_requests
        if self._num_under_way > limit:
            raise overloaded(f"{limit:,} calls are being answered, and no more are taken meanwhile; try again later")
        if name == "ModelInfer":
            self._service.batcher.check_room()


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether to log a record of grpc: not that a call ended before its answer, because clients do leave."""
    return record.exc_info is None or not isinstance(record.exc_info[1], grpc.aio.InternalError)


def _no_key() -> RefusedRequest:
    msg = "this needs an API key; send the metadata 'authorization: Bearer KEY' or 'x-api-key: KEY'"
    return RefusedRequest(HTTPStatus.UNAUTHORIZED, msg)


def _client(peer: str) -> str:
    """Return the client's address, of "ipv4:127.0.0.1:5000" or "ipv6:%5B::1%5D:5000"."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
