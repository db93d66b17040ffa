"""What people and simple programs send and read: rows as JSON objects by column name.

In: the body of `POST /predict`.  Out: rows.  And the columns of the model, with examples, for `GET /schema`.
"""

from collections.abc import Mapping
from typing import Any

import polars as pl

from torchdlrm.schema import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.serve.bundles import ServedBundle
from torchdlrm.serve.refusals import bad_request
from torchdlrm.serve.request_log import digits_of

NUM_EXAMPLES = 3


def rows_of(body: object) -> list[Mapping[str, object]]:
    """The rows of a request, one after another.

    Args:
        body: a list of rows; or `{"rows": [...]}`; or `{"shared": {...}, "candidates": [...]}`, where every candidate
            also has the shared columns.

    Raises:
        RefusedRequest: it is none of these.
    """
    if isinstance(body, list):
        return _rows(body, "")
    if not isinstance(body, dict):
        msg = f"the body is {_kind(body)}; send a list of rows, or an object with 'rows', or 'shared' and 'candidates'"
        raise bad_request(msg)
    names = set(body)
    if names == {"rows"}:
        return _rows(body["rows"], "rows: ")
    if names != {"shared", "candidates"}:
        msg = f"the body has the keys {sorted(names)[:8]}; it needs 'rows', or 'shared' and 'candidates', and no others"
        raise bad_request(msg)
    shared, candidates = body["shared"], _rows(body["candidates"], "candidates: ")
    if not isinstance(shared, dict):
        msg = f"shared: needs an object of cells by column name, not {_kind(shared)}"
        raise bad_request(msg)
    if not candidates:
        raise bad_request("candidates: needs one at least")
    for index, candidate in enumerate(candidates):
        if not shared.keys().isdisjoint(candidate):
            name = next(name for name in candidate if name in shared)
            msg = f"row {index}, column {name!r}: stands in 'shared' and in the candidate; leave it out of one"
            raise bad_request(msg)
    return [{**shared, **candidate} for candidate in candidates]


def describe(name: str, served: ServedBundle, max_rows: int) -> dict[str, Any]:
    """The columns of the model's log, in its order, and a few rows: what `GET /schema` answers."""
    columns = []
    for column in served.schema.columns:
        described: dict[str, Any] = {"name": column.name, "role": column.role}
        if column.header_name is not None:
            described["header_name"] = column.header_name
        if isinstance(column, LabelColumn) and column.threshold is not None:
            described["threshold"] = column.threshold
        if isinstance(column, DenseColumn | SparseColumn):
            described["kind"] = column.kind
            described["multi_valued"] = isinstance(column, SparseColumn) and column.is_multi_valued
        if isinstance(column, SparseColumn) and column.value_separator is not None:
            described["value_separator"] = column.value_separator
        columns.append(described)
    return {
        "model": name,
        "version": served.version,
        "separator": served.schema.separator,
        "quote": served.schema.quote,
        "max_rows": max_rows,
        "columns": columns,
        "examples": _examples(served),
    }


def _examples(served: ServedBundle) -> list[dict[str, object]]:
    frame = served.sample(NUM_EXAMPLES)
    features = [
        digits_of(frame[column.name], column) if isinstance(column, SparseColumn) else frame[column.name]
        for column in (*served.schema.dense, *served.schema.sparse)
    ]
    return [{name: _exact(cell) for name, cell in row.items()} for row in pl.DataFrame(features).to_dicts()]


def _exact(cell: object) -> object:
    """Integers as text where a reader of JSON that knows only float64, such as a browser, would round them."""
    if isinstance(cell, list):
        return [_exact(value) for value in cell]
    return str(cell) if isinstance(cell, int) and abs(cell) > 2**53 else cell


def _rows(value: object, where: str) -> list[Mapping[str, object]]:
    if not isinstance(value, list):
        msg = f"{where}needs a list of rows, not {_kind(value)}"
        raise bad_request(msg)
    for index, row in enumerate(value):
        if not isinstance(row, dict):
            msg = f"{where}row {index}: needs an object of cells by column name, not {_kind(row)}"
            raise bad_request(msg)
    return value


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
