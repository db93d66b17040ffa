"""How many fields a message of the protocol's gRPC half has, counted before it is parsed.

In: a `ModelInferRequest` as bytes.  Out: nothing, or a refusal.  protobuf builds all of a message in one call, during
which nothing else of the process can run: a message of 16 MiB may have a million parameters, which take it two seconds.
"""

from functools import cache

from torchdlrm.serving.open_inference.messages import MESSAGES
from torchdlrm.serving.refusals import too_large

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # how a field is written
_MAX_VARINT_BYTES = 10
_Inner = dict[int, "_Inner"]  # by their numbers: the fields that are messages, or (empty) numbers one after another
_NUMBERS: _Inner = {}


@cache
def _inner(name: str) -> _Inner:
    inner: _Inner = {}
    for _, number, kind in MESSAGES[name]:
        plain = kind.strip("[]{}|")
        if kind[0] == "{":
            inner[number] = {2: _inner(plain)}
        elif plain in MESSAGES:
            inner[number] = _inner(plain)
        elif kind[0] == "[" and plain not in {"string", "bytes"}:
            inner[number] = _NUMBERS
    return inner


def check_num_fields(message: bytes, max_fields: int, max_values: int) -> None:
    """See that a request has not too many fields; what is no message at all is left to the parser.

    Args:
        message: the request.
        max_fields: of the request and all that it holds, but for the values of tensors.
        max_values: of all tensors, where they stand in `contents`.

    Raises:
        RefusedRequest: it has more.
    """
    num_fields = num_values = 0
    parts = [(_inner("ModelInferRequest"), 0, len(message))]
    while parts:
        inner, at, end = parts.pop()
        is_contents = inner is _inner("InferTensorContents")
        while at < end:
            try:
                key, at = _varint(message, at)
                how, field, weight = key & 7, inner.get(key >> 3), 1
                if how == _VARINT:
                    _, at = _varint(message, at)
                elif how == _BYTES:
                    size, at = _varint(message, at)
                    if field is _NUMBERS:
                        weight += size // _MAX_VARINT_BYTES
                    elif field is not None:
                        parts.append((field, at, min(at + size, end)))
                    at += size
                elif how in {_FIXED64, _FIXED32}:
                    at += 8 if how == _FIXED64 else 4
            except (IndexError, ValueError):
                return
            num_values += weight if is_contents else 0
            num_fields += 0 if is_contents else weight
            if num_fields > max_fields or num_values > max_values:
                what = f"{max_values:,} values" if is_contents else f"{max_fields:,} fields beside values"
                msg = f"the message has more than {what}, and no more are taken; send several requests"
                raise too_large(msg)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
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
