"""The JSON of a request, if it has not too many values.

In: bytes of a body.  Out: what they say.  orjson builds all of it in one call, during which nothing else of the process
can run: 5 million empty objects, in a body of 16 MiB, would hold everybody up for half a second, in whatever thread.
"""

from typing import Any

import numpy as np
import orjson

from torchdlrm.features.schema import FeatureSchema
from torchdlrm.serving.refusals import MAX_VALUES, bad_request, too_large


def parse_json(body: bytes | bytearray | memoryview, schema: FeatureSchema, max_rows: int) -> Any:
    """Whatever JSON it is.

    Args:
        body: all of it.
        schema: the columns.
        max_rows: so many, with a value in all columns, are never too much.

    Raises:
        RefusedRequest: it is no JSON, or too much.
    """
    if len(body) > MAX_VALUES:
        max_values = max(MAX_VALUES, 2 * max_rows * len(schema.features))
        # Each value but the first of its list or object has a comma before it.  NumPy counts beside other threads.
        codes = np.frombuffer(body, np.uint8)
        num_values = sum(int(np.count_nonzero(codes == ord(mark))) for mark in ",[{")
        if num_values > max_values:
            msg = (
                f"the body has {num_values:,} values (by its commas and opening brackets), and at most "
                f"{max_values:,} are taken; send several requests"
            )
            raise too_large(msg)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        msg = f"the body is not JSON: {error}"
        raise bad_request(msg) from error
