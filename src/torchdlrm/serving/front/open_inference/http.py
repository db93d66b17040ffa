"""Implements the HTTP form of the Open Inference Protocol: JSON, and tensors as bytes behind it.

In: the body of a request to `infer`.  Out: an `InferRequest`; and, the other way, the body of the answer.  With the
header `Inference-Header-Content-Length` the JSON is that many bytes long, and the tensors that have a
`binary_data_size` follow it in the order of the inputs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.errors import shown
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.prediction.predictor import Rows
from torchdlrm.serving.front.bodies import parse_json
from torchdlrm.serving.front.open_inference.columns import OUTPUT, Inputs, rows_of_tensors
from torchdlrm.serving.front.open_inference.tensors import from_bytes, from_json
from torchdlrm.serving.service.refusals import bad_request

HEADER_LENGTH = "Inference-Header-Content-Length"
_MAX_ID_CHARACTERS = 256
EXTENSIONS = ["binary_tensor_data"]


@dataclass(frozen=True)
class InferRequest:
    """A client's rows, and the form of the answer that it wants.

    Attributes:
        rows: as `rows_of_tensors` gives them.
        request_id: comes back with the answer, if there is one.
        outputs: those that are wanted, and whether each is sent as bytes.
        timeout_us: the client's own deadline, if it has one.
    """

    rows: Rows
    request_id: str | None
    outputs: Mapping[str, bool]
    timeout_us: int | None


def parse_infer(
    body: bytes | bytearray, header_length: str | None, schema: FeatureSchema, max_rows: int
) -> InferRequest:
    """Read the body of a request; `header_length` is its `Inference-Header-Content-Length`, if it has one.

    Raises:
        RefusedRequest: it is not as the protocol says.
    """
    view = memoryview(body)
    json_bytes = len(view) if header_length is None else _header_length(header_length, len(view))
    request = _object(parse_json(view[:json_bytes], schema, max_rows), "the request")
    rest = view[json_bytes:]
    items = request.get("inputs")
    if not isinstance(items, list):
        raise bad_request("inputs: needs a list of tensors")
    inputs = Inputs(schema, max_rows, len(items))
    tensors = []
    position = 0
    for item in items:
        tensor = _object(item, "an input")
        name = tensor.get("name")
        if not isinstance(name, str):
            raise bad_request("an input: needs a name")
        datatype, shape = inputs.place(name, tensor.get("datatype"), tensor.get("shape"))
        size = _parameters(tensor, name).get("binary_data_size")
        if size is None:
            tensors.append(from_json(name, datatype, shape, tensor.get("data")))
            continue
        if type(size) is not int or size < 0 or position + size > len(rest):
            msg = f"input {name!r}: binary_data_size {shown(size)}, but {len(rest) - position:,} bytes are left"
            raise bad_request(msg)
        if "data" in tensor:
            raise bad_request(f"input {name!r}: has both data and binary_data_size")
        tensors.append(from_bytes(name, datatype, shape, rest[position : position + size]))
        position += size
    if position != len(rest):
        msg = f"{len(rest):,} bytes follow the JSON, but the inputs' binary_data_size account for {position:,}"
        raise bad_request(msg)
    parameters = _parameters(request, "the request")
    request_id, outputs = check_id(request.get("id")), _wanted_outputs(request, parameters, schema)
    timeout_us = _timeout_us(parameters)
    return InferRequest(rows_of_tensors(tensors, inputs), request_id, outputs, timeout_us)


def format_infer(
    model: str, bundle: Bundle, request: InferRequest, probabilities: NDArray[np.float32]
) -> tuple[bytes, dict[str, str]]:
    """Format the body of the answer to a request, by a bundle, with float32 probabilities, and its headers."""
    found, data = bundle.schema.by_label(probabilities, OUTPUT), b""
    outputs: list[dict[str, Any]] = [
        {"name": name, "datatype": "FP32", "shape": [len(probabilities)]} for name in request.outputs
    ]
    answer: dict[str, Any] = {"model_name": model, "model_version": bundle.version, "outputs": outputs}
    if bundle.period is not None:
        answer["parameters"] = {"period": bundle.period}
    if request.request_id is not None:
        answer["id"] = request.request_id
    for output, (name, is_binary) in zip(outputs, request.outputs.items(), strict=True):
        if is_binary:
            output["parameters"] = {"binary_data_size": 4 * len(probabilities)}
            data += found[name].astype("<f4").tobytes()
        else:
            output["data"] = found[name]
    header = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any(request.outputs.values()):
        return header, {"Content-Type": "application/json"}
    return header + data, {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(header))}


def _header_length(text: str, num_bytes: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20) or int(text) > num_bytes:
        raise bad_request(f"{HEADER_LENGTH}: {shown(text)} is not a number of bytes within the body's {num_bytes:,}")
    return int(text)


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise bad_request(f"{what}: needs a JSON object, not {type(value).__name__}")
    return value


def _parameters(holder: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    parameters = holder.get("parameters")
    if parameters is None:
        return {}
    parameters = _object(parameters, f"parameters of {what}")
    check_parameters(parameters, what)
    return parameters


def check_id(request_id: object) -> str | None:
    """Refuse an id that is no text, or a long one; return it."""
    if request_id is None or (isinstance(request_id, str) and len(request_id) <= _MAX_ID_CHARACTERS):
        return request_id
    raise bad_request(f"id: needs a text of at most {_MAX_ID_CHARACTERS} characters")


def _wanted_outputs(
    request: Mapping[str, Any], parameters: Mapping[str, Any], schema: FeatureSchema
) -> Mapping[str, bool]:
    is_binary, there = _flag(parameters.get("binary_data_output"), "binary_data_output"), schema.label_columns(OUTPUT)
    outputs = request.get("outputs")
    if outputs is None or outputs == []:
        return dict.fromkeys(there, is_binary)
    if not isinstance(outputs, list):
        raise bad_request("outputs: needs a list")
    check_num_outputs(len(outputs), there)
    wanted = {}
    for item in outputs:
        output = _object(item, "an output")
        own = _parameters(output, "an output")
        name = check_output(output.get("name"), own, there)
        wanted[name] = _flag(own.get("binary_data", is_binary), "binary_data")
    return wanted


def check_num_outputs(num_outputs: int, there: Sequence[str]) -> None:
    """Refuse a client that asks for more outputs than there are."""
    if num_outputs > len(there):
        raise bad_request(f"outputs: {num_outputs:,} are asked for, and there {_are(there)}")


def check_output(name: object, parameters: Mapping[str, Any], there: Sequence[str]) -> str:
    """Refuse a client that asks for another output than there are, or for another form of it; return its name."""
    if not isinstance(name, str) or name not in there:
        raise bad_request(f"outputs: {shown(name)} is none; there {_are(there)}")
    if parameters.get("classification"):
        raise bad_request("outputs: classification is not offered; a prediction is one probability")
    return name


def _are(outputs: Sequence[str]) -> str:
    return f"is one, {outputs[0]!r}" if len(outputs) == 1 else f"are {', '.join(map(repr, outputs))}"


def check_parameters(names: Iterable[str], what: str) -> None:
    """Refuse a client that asks for memory to be shared."""
    for name in names:
        if name.startswith("shared_memory"):
            msg = f"parameters of {what}: {shown(name)}: this server shares no memory with clients; send the data"
            raise bad_request(msg)


def _flag(value: object, name: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{name}: needs true or false")
    return bool(value)


def _timeout_us(parameters: Mapping[str, Any]) -> int | None:
    timeout = parameters.get("timeout")
    if timeout is not None and (type(timeout) is not int or timeout < 0):
        raise bad_request("parameters: timeout needs a whole number of microseconds")
    return timeout or None
