"""Reads the body of a request, from its first byte to its JSON, within limits.

In: a request whose body is still coming.  Out: its bytes, then what they say.
"""

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, TypeVar

import numpy as np
import orjson
from starlette.requests import Request

from torchdlrm.features.schema import FeatureSchema
from torchdlrm.serving.front.exchange import ARRIVED, IS_COMPLETE
from torchdlrm.serving.options import ServeOptions
from torchdlrm.serving.service.refusals import MAX_VALUES, RefusedRequest, bad_request, too_large, too_slow
from torchdlrm.serving.service.uploads import Uploads

LARGE_BYTES = 256 << 10

Parsed = TypeVar("Parsed")


async def off_loop_if_large(parse: Callable[[], Parsed], num_bytes: int) -> Parsed:
    """Parse; in a thread where there are many bytes, so that other requests need not wait."""
    return await asyncio.to_thread(parse) if num_bytes > LARGE_BYTES else parse()


async def read_body(request: Request, options: ServeOptions, uploads: Uploads) -> tuple[bytes, float]:
    """Read the body; also return when the request's time began: at its headers, or at the end of a slow body.

    Raises:
        RefusedRequest: it is too long, compressed or too slow, or its client has gone.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        msg = "Content-Encoding: a compressed body is not taken; send it as it is"
        raise RefusedRequest(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, msg)
    if request.scope.get(IS_COMPLETE):  # most are: no timer is set for them
        body: bytes = (await request.receive())["body"]
        _check_length(len(body), options)
        return body, request.scope[ARRIVED]
    length = request.headers.get("content-length", "0")
    _check_length(int(length) if length.isdigit() else 0, options)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(options.body_timeout_s) as timeout:
            with uploads.track(timeout) as count:
                has_more = True
                while has_more:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise bad_request("the connection was closed within the body")
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    _check_length(size, options)
                    has_more = message.get("more_body", False)
                    if has_more:
                        count(len(pieces[-1]))
    except TimeoutError as error:
        raise too_slow(options.body_timeout_s) from error
    return b"".join(pieces), time.perf_counter()


def _check_length(num_bytes: int, options: ServeOptions) -> None:
    if num_bytes > options.max_body_bytes:
        msg = f"the body has more than {options.max_body_bytes:,} bytes, and no more are taken; send several requests"
        raise too_large(msg)


def parse_json(body: bytes | bytearray | memoryview, schema: FeatureSchema, max_rows: int) -> Any:
    """Parse the JSON of a request, unless it has too many values.

    orjson builds all of it in one call, during which nothing else of the process can run: 5 million empty objects, in a
    body of 16 MiB, would hold all other requests up for half a second, in whatever thread.  `max_rows` rows with a
    value in all columns are never too much.

    Raises:
        RefusedRequest: it is no JSON, or too much.
    """
    if len(body) > MAX_VALUES:
        max_values = max(MAX_VALUES, 2 * max_rows * len(schema.features))
        # Each value but the first of its list or object has a comma before it.  NumPy counts while other threads run.
        codes = np.frombuffer(body, np.uint8)
        num_values = sum(int(np.count_nonzero(codes == ord(mark))) for mark in ",[{")
        if num_values > max_values:
            raise too_large(
                f"the body has {num_values:,} values (by its commas and opening brackets), and at most "
                f"{max_values:,} are taken; send several requests"
            )
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error}") from error
