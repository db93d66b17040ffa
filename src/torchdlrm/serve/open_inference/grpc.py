"""The gRPC half of the Open Inference Protocol.

In: messages of `GRPCInferenceService`.  Out: the same answers as over HTTP; a request that is refused ends with the
status of gRPC that says the same as HTTP's.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from torchdlrm import __version__
from torchdlrm.errors import ConfigError
from torchdlrm.schema import FeatureSchema
from torchdlrm.serve.batch import Rows
from torchdlrm.serve.open_inference.columns import OUTPUT, Inputs, features_of, model_metadata, rows_of_tensors
from torchdlrm.serve.open_inference.http import (
    EXTENSIONS,
    MAX_ID_CHARACTERS,
    check_num_outputs,
    check_output,
    check_parameters,
)
from torchdlrm.serve.open_inference.message_size import check_num_fields
from torchdlrm.serve.open_inference.messages import CLASSES, METHODS, PACKAGE, SERVICE
from torchdlrm.serve.open_inference.tensors import BYTES, MAX_DIMENSIONS, from_bytes, from_numbers, from_texts
from torchdlrm.serve.refusals import RefusedRequest, bad_request, overloaded, too_large
from torchdlrm.serve.request_id import request_id_of
from torchdlrm.serve.service import LARGE_BYTES, Service, off_loop_if_large

Context = Any  # grpc.aio.ServicerContext; grpc comes without types


@dataclass(frozen=True, slots=True)
class Call:
    """What a method knows of its call, beside the message."""

    context: Context
    request_id: str
    num_bytes: int


Method = Callable[[Any, Call], Awaitable[Any]]

_STATUS = {
    HTTPStatus.BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.UNAUTHORIZED: grpc.StatusCode.UNAUTHENTICATED,
    HTTPStatus.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    HTTPStatus.SERVICE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
}
# Before the server stops: calls are waited for until none has arrived for so long, or at most so long.
_QUIET_S, _MAX_WAIT_S = 0.05, 0.5
_HEALTH = {"ServerLive", "ServerReady", "ModelReady"}  # without a key, and however much there is to do
_MAX_NAMES_BYTES = 4 << 10  # of a message that has nothing but names
# Beside the values of a tensor: what it is called and such, four fields for each parameter, and its raw contents.
_FIELDS_PER_INPUT = 64
_CONTENTS = {
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}


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
        self._service = service
        self._num_calls = self._num_under_way = 0
        self._may_answer = asyncio.Event()
        self._may_answer.set()
        options = [
            ("grpc.so_reuseport", int(share_port)),
            ("grpc.max_receive_message_length", service.options.max_body_bytes),
            ("grpc.max_metadata_size", 32 << 10),
        ]
        self._server = grpc.aio.server(options=options)
        methods = _Methods(service)
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._waiting(self._guarded(getattr(methods, name), name)),
                response_serializer=CLASSES[f"{name}Response"].SerializeToString,
            )
            for name in METHODS
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"{PACKAGE}.{SERVICE}", handlers),))
        try:
            self.port: int = self._server.add_insecure_port(address)
        except RuntimeError as error:
            msg = f"--grpc-port {service.options.grpc_port}: {address} cannot be listened to; choose another"
            raise ConfigError(msg) from error

    async def start(self) -> None:
        """Begin to answer."""
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

    def _guarded(self, method: Method, name: str) -> Callable[[bytes, Context], Awaitable[Any]]:
        """A method behind the checks, figures and log that HTTP has too."""
        service = self._service

        async def answer(message: bytes, context: Context) -> Any:
            started_s = time.perf_counter()
            refused: RefusedRequest | None = None
            answered = None
            metadata = {str(key).encode(): _bytes(value) for key, value in context.invocation_metadata() or ()}
            request_id = request_id_of(metadata.get(b"x-request-id", b""))
            self._num_under_way += 1
            try:
                self._check_admitted(name, metadata)
                request = await off_loop_if_large(lambda: _parse(name, message, service), len(message))
                request_id = request_id or request_id_of(getattr(request, "id", "")) or service.new_request_id()
                answered = await method(request, Call(context, request_id, len(message)))
            except DecodeError:
                refused = bad_request(f"the message is no {name}Request")
            except RefusedRequest as error:
                # Which models there are is told to nobody without a key, nor by the way of health.
                is_told = error.status != HTTPStatus.NOT_FOUND or service.keys.accept(metadata)
                refused = error if is_told else _no_key()
            except Exception as error:  # noqa: BLE001 - told in the log, and to the client without the inside
                service.lines.write("error", "failure", request_id=request_id, method=name, message=repr(error))
                refused = RefusedRequest(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed; its log says why")
            finally:
                self._num_under_way -= 1
            request_id = request_id or service.new_request_id()
            context.set_trailing_metadata((("x-request-id", request_id),))
            status = HTTPStatus.OK if refused is None else refused.status
            total_s = time.perf_counter() - started_s
            service.metrics.request_done(f"grpc {name}", status, total_s)
            level = "debug" if name in _HEALTH else "info"
            service.lines.write(
                level,  # type: ignore[arg-type]  # one of two that are
                "request",
                request_id=request_id,
                method="grpc",
                path=name,
                status=int(status),
                milliseconds=round(1e3 * total_s, 3),
                client=_client(context.peer()),
            )
            if refused is not None:
                await context.abort(_STATUS.get(refused.status, grpc.StatusCode.INTERNAL), refused.message)
            return answered

        return answer

    def _check_admitted(self, name: str, metadata: Mapping[bytes, bytes]) -> None:
        """Before anything is done for a call.

        Raises:
            RefusedRequest: too many are under way, or it has no key; health is always told.
        """
        if name in _HEALTH:
            return
        limit = self._service.options.max_concurrent_requests
        if self._num_under_way > limit:
            msg = f"{limit:,} calls are under way, and no more are taken at once; ask again later"
            raise overloaded(msg)
        if not self._service.keys.accept(metadata):
            raise _no_key()
        if name == "ModelInfer":
            self._service.batcher.check_room()

    def _waiting(
        self, answer: Callable[[bytes, Context], Awaitable[Any]]
    ) -> Callable[[bytes, Context], Awaitable[Any]]:
        async def wait_and_answer(message: bytes, context: Context) -> Any:
            self._num_calls += 1
            if not self._may_answer.is_set():
                await self._may_answer.wait()
            return await answer(message, context)

        return wait_and_answer


class _Methods:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def ServerLive(self, _request: Any, _call: Call) -> Any:  # noqa: N802 - the protocol's names
        return CLASSES["ServerLiveResponse"](live=self._service.is_live)

    async def ServerReady(self, _request: Any, _call: Call) -> Any:  # noqa: N802
        return CLASSES["ServerReadyResponse"](ready=self._service.is_ready)

    async def ModelReady(self, request: Any, _call: Call) -> Any:  # noqa: N802
        self._service.check_model(request.name, request.version)
        return CLASSES["ModelReadyResponse"](ready=self._service.is_ready)

    async def ServerMetadata(self, _request: Any, _call: Call) -> Any:  # noqa: N802
        return CLASSES["ServerMetadataResponse"](name="torchdlrm", version=__version__, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: Any, _call: Call) -> Any:  # noqa: N802
        served = self._service.check_model(request.name, request.version)
        return CLASSES["ModelMetadataResponse"](**model_metadata(self._service.name, served.version, served.schema))

    async def ModelInfer(self, request: Any, call: Call) -> Any:  # noqa: N802
        service, started_s = self._service, time.perf_counter()
        served = service.check_model(request.model_name, request.model_version)
        max_rows = service.options.max_rows_per_request
        rows = await off_loop_if_large(lambda: _rows(request, served.schema, max_rows), call.num_bytes)
        remaining_s = call.context.time_remaining()
        answer = await service.predict(
            served,
            rows,
            num_bytes=call.num_bytes,
            request_id=call.request_id,
            started_s=started_s,
            timeout_us=None if remaining_s is None else max(0, int(1e6 * remaining_s)),
            is_gone=call.context.cancelled,
        )
        response = CLASSES["ModelInferResponse"](model_name=service.name, model_version=served.version, id=request.id)
        output = response.outputs.add(name=OUTPUT, datatype="FP32", shape=[len(answer.probabilities)])
        if request.raw_input_contents:
            response.raw_output_contents.append(answer.probabilities.astype("<f4").tobytes())
        else:
            output.contents.fp32_contents.extend(answer.probabilities.tolist())
        return response


def _no_key() -> RefusedRequest:
    msg = "this needs an API key; send the metadata 'authorization: Bearer KEY' or 'x-api-key: KEY'"
    return RefusedRequest(HTTPStatus.UNAUTHORIZED, msg)


def _parse(name: str, message: bytes, service: Service) -> Any:
    """The request of a method.

    Raises:
        DecodeError: the bytes are no such message.
        RefusedRequest: they are too many, or have too many parts.
    """
    if name != "ModelInfer" and len(message) > _MAX_NAMES_BYTES:
        msg = f"the message has {len(message):,} bytes, and a {name}Request at most {_MAX_NAMES_BYTES:,}"
        raise too_large(msg)
    if len(message) > LARGE_BYTES:
        num_columns = len(features_of(service.bundles.current.schema))
        max_values = num_columns * service.options.max_rows_per_request
        check_num_fields(message, _FIELDS_PER_INPUT * (num_columns + 1), max_values)
    return CLASSES[f"{name}Request"].FromString(message)


def _rows(request: Any, schema: FeatureSchema, max_rows: int) -> Rows:
    items: Sequence[Any] = request.inputs
    raw: Sequence[bytes] = request.raw_input_contents
    if len(request.id) > MAX_ID_CHARACTERS:
        msg = f"id: needs a text of at most {MAX_ID_CHARACTERS} characters"
        raise bad_request(msg)
    check_parameters(request.parameters, "the request")
    check_num_outputs(len(request.outputs))
    for output in request.outputs:
        check_parameters(output.parameters, "an output")
        check_output(output.name, {name: _value(given) for name, given in output.parameters.items()})
    if raw and len(raw) != len(items):
        msg = f"raw_input_contents: {len(raw):,} pieces for {len(items):,} inputs; each input needs one"
        raise bad_request(msg)
    inputs = Inputs(schema, max_rows, len(items))
    tensors = []
    for index, item in enumerate(items):
        datatype, shape = inputs.place(item.name, item.datatype, list(item.shape[: MAX_DIMENSIONS + 1]))
        check_parameters(item.parameters, item.name)
        if raw:
            if item.HasField("contents"):
                msg = f"input {item.name!r}: has both contents and a piece of raw_input_contents"
                raise bad_request(msg)
            tensors.append(from_bytes(item.name, datatype, shape, raw[index]))
            continue
        if datatype not in _CONTENTS:
            msg = f"input {item.name!r}: {datatype} has no contents field; send raw_input_contents"
            raise bad_request(msg)
        values = getattr(item.contents, _CONTENTS[datatype])
        if datatype == BYTES:
            tensors.append(from_texts(item.name, shape, values))
        else:
            tensors.append(from_numbers(item.name, datatype, shape, values))
    return rows_of_tensors(tensors, inputs, schema)


def _value(parameter: Any) -> object:
    choice = parameter.WhichOneof("parameter_choice")
    return None if choice is None else getattr(parameter, choice)


def _client(peer: str) -> str:
    """The client's address, of "ipv4:127.0.0.1:5000" or "ipv6:%5B::1%5D:5000"."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
