"""Implements the methods of the gRPC half of the Open Inference Protocol.

In: a message of `GRPCInferenceService`, and its call.  Out: the message that answers it.
"""

import time
from collections.abc import Sequence
from typing import Any

from torchdlrm import __version__
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.prediction.predictor import Rows
from torchdlrm.serving.front.bodies import LARGE_BYTES, off_loop_if_large
from torchdlrm.serving.front.open_inference.columns import OUTPUT, Inputs, model_metadata, rows_of_tensors
from torchdlrm.serving.front.open_inference.http import (
    EXTENSIONS,
    check_id,
    check_num_outputs,
    check_output,
    check_parameters,
)
from torchdlrm.serving.front.open_inference.messages import CLASSES, check_num_fields
from torchdlrm.serving.front.open_inference.tensors import BYTES, MAX_DIMENSIONS, from_bytes, from_numbers, from_texts
from torchdlrm.serving.service.batcher import PredictionRequest
from torchdlrm.serving.service.refusals import bad_request, too_large
from torchdlrm.serving.service.service import Service

Context = Any  # grpc.aio.ServicerContext; grpc comes without types

_MAX_NAMES_BYTES = 4 << 10  # of a message that has nothing but names
# Besides the values of a tensor: its name, datatype and shape, four fields for each parameter, and its raw contents.
_FIELDS_PER_INPUT = 64
_CONTENTS = {
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}


async def answer(service: Service, name: str, request: Any, context: Context, request_id: str) -> Any:
    """Answer a call that is admitted.

    Raises:
        RefusedRequest: there is no such model or version, or no prediction for the rows.
    """
    response = CLASSES[f"{name}Response"]
    match name:
        case "ServerLive":
            return response(live=service.is_live)
        case "ServerReady":
            return response(ready=service.is_ready)
        case "ModelReady":
            service.check_model(request.name, request.version)
            return response(ready=service.is_ready)
        case "ServerMetadata":
            return response(name="torchdlrm", version=__version__, extensions=EXTENSIONS)
        case "ModelMetadata":
            served = service.check_model(request.name, request.version)
            return response(**model_metadata(service.name, served.version, served.schema))
        case _:
            return await _infer(service, request, context, request_id)


async def _infer(service: Service, request: Any, context: Context, request_id: str) -> Any:
    started_s, num_bytes = time.perf_counter(), request.ByteSize()
    served = service.check_model(request.model_name, request.model_version)
    max_rows = service.options.max_rows_per_request
    rows = await off_loop_if_large(lambda: _rows(request, served.schema, max_rows), num_bytes)
    remaining_s = context.time_remaining()
    timeout_us = None if remaining_s is None else max(0, int(1e6 * remaining_s))
    predicted = await service.predict(
        PredictionRequest(served, rows, num_bytes, request_id, started_s, context.cancelled, timeout_us)
    )
    response = CLASSES["ModelInferResponse"](model_name=service.name, model_version=served.version, id=request.id)
    if served.bundle.period is not None:
        response.parameters["period"].int64_param = served.bundle.period
    found = served.schema.by_label(predicted.probabilities, OUTPUT)
    for name in dict.fromkeys(asked.name for asked in request.outputs) or found:
        output = response.outputs.add(name=name, datatype="FP32", shape=[len(found[name])])
        if request.raw_input_contents:
            response.raw_output_contents.append(found[name].astype("<f4").tobytes())
        else:
            output.contents.fp32_contents.extend(found[name].tolist())
    return response


def parse(name: str, message: bytes, service: Service) -> Any:
    """Parse the request of a method.

    Raises:
        DecodeError: the bytes are no such message.
        RefusedRequest: they are too many, or have too many parts.
    """
    if name != "ModelInfer" and len(message) > _MAX_NAMES_BYTES:
        raise too_large(f"the message has {len(message):,} bytes, and a {name}Request at most {_MAX_NAMES_BYTES:,}")
    if len(message) > LARGE_BYTES:
        num_columns = len(service.bundles.current.schema.features)
        max_values = num_columns * service.options.max_rows_per_request
        check_num_fields(message, _FIELDS_PER_INPUT * (num_columns + 1), max_values)
    return CLASSES[f"{name}Request"].FromString(message)


def _rows(request: Any, schema: FeatureSchema, max_rows: int) -> Rows:
    items: Sequence[Any] = request.inputs
    raw: Sequence[bytes] = request.raw_input_contents
    check_id(request.id)
    check_parameters(request.parameters, "the request")
    check_num_outputs(len(request.outputs), there := schema.label_columns(OUTPUT))
    for output in request.outputs:
        check_parameters(output.parameters, "an output")
        check_output(output.name, {name: _value(given) for name, given in output.parameters.items()}, there)
    if raw and len(raw) != len(items):
        raise bad_request(f"raw_input_contents: {len(raw):,} pieces for {len(items):,} inputs; each input needs one")
    inputs = Inputs(schema, max_rows, len(items))
    tensors = []
    for index, item in enumerate(items):
        datatype, shape = inputs.place(item.name, item.datatype, list(item.shape[: MAX_DIMENSIONS + 1]))
        check_parameters(item.parameters, item.name)
        if raw:
            if item.HasField("contents"):
                raise bad_request(f"input {item.name!r}: has both contents and a piece of raw_input_contents")
            tensors.append(from_bytes(item.name, datatype, shape, raw[index]))
            continue
        if datatype not in _CONTENTS:
            raise bad_request(f"input {item.name!r}: {datatype} has no contents field; send raw_input_contents")
        values = getattr(item.contents, _CONTENTS[datatype])
        if datatype == BYTES:
            tensors.append(from_texts(item.name, shape, values))
        else:
            tensors.append(from_numbers(item.name, datatype, shape, values))
    return rows_of_tensors(tensors, inputs)


def _value(parameter: Any) -> object:
    choice = parameter.WhichOneof("parameter_choice")
    return None if choice is None else getattr(parameter, choice)
