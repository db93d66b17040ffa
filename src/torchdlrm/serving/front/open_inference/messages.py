"""Defines the messages of the protocol's gRPC half, from their field numbers.

In: the table below, which is the protocol's grpc_predict_v2.proto as far as a server of predictions needs it; unknown
fields are skipped, as protobuf does.  Out: message classes.  They live in a pool of their own, so that a program which
also loads another description of the same protocol (every client library has one) keeps working.
"""

from functools import cache
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from torchdlrm.serving.service.refusals import too_large

PACKAGE = "inference"
SERVICE = "GRPCInferenceService"

_TENSOR = [
    ("name", 1, "string"),
    ("datatype", 2, "string"),
    ("shape", 3, "[int64]"),
    ("parameters", 4, "{InferParameter}"),
    ("contents", 5, "InferTensorContents"),
]
# message -> fields as (name, number, type); [] is repeated, {} a map from string, | one of a group.
MESSAGES: dict[str, list[tuple[str, int, str]]] = {
    "ServerLiveRequest": [],
    "ServerLiveResponse": [("live", 1, "bool")],
    "ServerReadyRequest": [],
    "ServerReadyResponse": [("ready", 1, "bool")],
    "ModelReadyRequest": [("name", 1, "string"), ("version", 2, "string")],
    "ModelReadyResponse": [("ready", 1, "bool")],
    "ServerMetadataRequest": [],
    "ServerMetadataResponse": [("name", 1, "string"), ("version", 2, "string"), ("extensions", 3, "[string]")],
    "ModelMetadataRequest": [("name", 1, "string"), ("version", 2, "string")],
    "TensorMetadata": [("name", 1, "string"), ("datatype", 2, "string"), ("shape", 3, "[int64]")],
    "ModelMetadataResponse": [
        ("name", 1, "string"),
        ("versions", 2, "[string]"),
        ("platform", 3, "string"),
        ("inputs", 4, "[TensorMetadata]"),
        ("outputs", 5, "[TensorMetadata]"),
    ],
    "InferParameter": [
        ("bool_param", 1, "|bool"),
        ("int64_param", 2, "|int64"),
        ("string_param", 3, "|string"),
        ("double_param", 4, "|double"),
        ("uint64_param", 5, "|uint64"),
    ],
    "InferTensorContents": [
        ("bool_contents", 1, "[bool]"),
        ("int_contents", 2, "[int32]"),
        ("int64_contents", 3, "[int64]"),
        ("uint_contents", 4, "[uint32]"),
        ("uint64_contents", 5, "[uint64]"),
        ("fp32_contents", 6, "[float]"),
        ("fp64_contents", 7, "[double]"),
        ("bytes_contents", 8, "[bytes]"),
    ],
    "InferInputTensor": _TENSOR,
    "InferRequestedOutputTensor": [("name", 1, "string"), ("parameters", 2, "{InferParameter}")],
    "InferOutputTensor": _TENSOR,
    "ModelInferRequest": [
        ("model_name", 1, "string"),
        ("model_version", 2, "string"),
        ("id", 3, "string"),
        ("parameters", 4, "{InferParameter}"),
        ("inputs", 5, "[InferInputTensor]"),
        ("outputs", 6, "[InferRequestedOutputTensor]"),
        ("raw_input_contents", 7, "[bytes]"),
    ],
    "ModelInferResponse": [
        ("model_name", 1, "string"),
        ("model_version", 2, "string"),
        ("id", 3, "string"),
        ("parameters", 4, "{InferParameter}"),
        ("outputs", 5, "[InferOutputTensor]"),
        ("raw_output_contents", 6, "[bytes]"),
    ],
}
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # how a field is written
_MAX_VARINT_BYTES = 10


def _field(message: DescriptorProto, name: str, number: int, kind: str) -> None:
    field = message.field.add(name=name, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL)
    if kind[0] in "[{":
        field.label = FieldDescriptorProto.LABEL_REPEATED
    if kind[0] == "|":
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    plain = kind.strip("[]{}|")
    if kind[0] == "{":
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _field(entry, "key", 1, "string")
        _field(entry, "value", 2, plain)
        plain = f"{message.name}.{entry.name}"
    if plain[0].isupper():
        field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{PACKAGE}.{plain}"
    else:
        field.type = FieldDescriptorProto.Type.Value(f"TYPE_{plain.upper()}")


def _message_classes() -> dict[str, Any]:
    file = FileDescriptorProto(name="torchdlrm/open_inference.proto", package=PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            _field(message, *field)
    pool = DescriptorPool()
    pool.Add(file)
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES}


CLASSES = _message_classes()


@cache
def _inner(message: Any) -> dict[int, Any]:
    """By their numbers: the fields of a message that are messages, by what they are, or several numbers (None)."""
    return {
        field.number: field.message_type
        for field in message.fields
        if field.message_type or (field.is_repeated and field.type not in {field.TYPE_STRING, field.TYPE_BYTES})
    }


def check_num_fields(message: bytes, max_fields: int, max_values: int) -> None:
    """Refuse a request with too many fields before it is parsed; what is no message is left to the parser.

    protobuf builds all of a message in one call, during which nothing else of the process can run: a message of 16 MiB
    may have a million parameters, which take it two seconds.

    Args:
        message: a `ModelInferRequest`.
        max_fields: of the request and all that it holds, but for the values of tensors.
        max_values: of all tensors, where they stand in `contents`.

    Raises:
        RefusedRequest: it has more.
    """
    num_fields = num_values = 0
    contents = CLASSES["InferTensorContents"].DESCRIPTOR
    parts = [(CLASSES["ModelInferRequest"].DESCRIPTOR, 0, len(message))]
    while parts:
        what, at, end = parts.pop()
        inner, is_contents = _inner(what), what is contents
        while at < end:
            try:
                key, at = _varint(message, at)
                how, number, weight = key & 7, key >> 3, 1
                if how == _VARINT:
                    _, at = _varint(message, at)
                elif how == _BYTES:
                    size, at = _varint(message, at)
                    if (field := inner.get(number)) is not None:
                        parts.append((field, at, min(at + size, end)))
                    elif number in inner:
                        weight += size // _MAX_VARINT_BYTES
                    at += size
                elif how in {_FIXED64, _FIXED32}:
                    at += 8 if how == _FIXED64 else 4
            except (IndexError, ValueError):
                return
            num_values += weight if is_contents else 0
            num_fields += 0 if is_contents else weight
            if num_fields > max_fields or num_values > max_values:
                most = f"{max_values:,} values" if is_contents else f"{max_fields:,} fields besides values"
                raise too_large(f"the message has more than {most}, and no more are taken; send several requests")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Read a number of seven bits a byte; also return where it ends."""
    value = message[at]
    if value < 0x80:
        return value, at + 1
    value &= 0x7F
    for place in range(1, _MAX_VARINT_BYTES):
        byte = message[at + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError
