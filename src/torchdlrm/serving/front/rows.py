"""Implements the simple JSON API: rows as objects by column name.

In: the body of `POST /predict` or `/explain`.  Out: rows.  And the columns of the model, with examples, for `GET
/schema`.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any

from torchdlrm.errors import RowError, shown
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.vectors import is_vector
from torchdlrm.prediction.explain import LeftOut
from torchdlrm.prediction.json_rows import Part, Row, RowNames, SharedRows, in_shared_too, parts_of
from torchdlrm.serving.front.bodies import parse_json
from torchdlrm.serving.service.bundles import Examples
from torchdlrm.serving.service.refusals import MAX_VALUES, bad_request, check_num_rows, check_num_values, too_large

# What `shared` may come to with all candidates: the characters of its texts, its other cells, the values of its lists.
MAX_SHARED_CHARACTERS = 1 << 24
_MAX_KEYS_SHOWN = 8


def read_rows(body: bytes, schema: FeatureSchema, max_rows: int) -> tuple[Sequence[Row], int]:
    """Read the rows of a request.

    Args:
        body: JSON: a list of rows; or `{"rows": [...]}`; or `{"shared": {...}, "candidates": [...]}`, where every
            candidate also has the shared columns.
        schema: the columns.
        max_rows: more are refused, before anything is done with them.

    Returns:
        The rows, and about how many bytes they would have without `shared`, which tells how much work they are.

    Raises:
        RefusedRequest: it is none of these, or too much.
    """
    rows = _rows_of(parse_json(body, schema, max_rows), schema, max_rows)
    num_bytes = len(body) + sum(_characters(shared) * (len(own) - 1) for shared, own in parts_of(rows) if shared)
    _check_values(rows, num_bytes, schema)
    return rows, num_bytes


def read_left_out(body: bytes, schema: FeatureSchema, max_rows: int, label: str | None = None) -> tuple[LeftOut, int]:
    """Read rows to explain, as `read_rows`; its limits hold for all predictions, but one row is always taken.

    Of several labels `label` is the one to explain; the first when not given.
    """
    rows, num_bytes = read_rows(body, schema, max_rows)
    num_predictions = sum(1 + len(row) for row in rows)
    if len(rows) > 1 and num_predictions > max_rows:
        msg = f"{len(rows):,} rows take {num_predictions:,} predictions to explain, and at most {max_rows:,} are made"
        raise too_large(msg)
    try:
        left_out = LeftOut(list(rows), schema, label)
    except RowError as error:
        raise bad_request(str(error)) from error
    num_bytes *= 1 + len(schema.features)
    _check_values(left_out.rows, num_bytes, schema)
    return left_out, num_bytes


def _check_values(rows: Sequence[Row], num_bytes: int, schema: FeatureSchema) -> None:
    if num_bytes > MAX_VALUES:
        for column in schema.sparse:
            if column.value_separator is not None:
                keys = RowNames(schema).keys(column)
                check_num_values(sum(_num_values(part, column, keys) for part in parts_of(rows)), column)


def _rows_of(body: object, schema: FeatureSchema, max_rows: int) -> Sequence[Row]:
    if isinstance(body, list):
        return _rows(body, "", max_rows)
    if not isinstance(body, dict):
        msg = f"the body is {_kind(body)}; send a list of rows, or an object with 'rows', or 'shared' and 'candidates'"
        raise bad_request(msg)
    if body.keys() == {"rows"}:
        return _rows(body["rows"], "rows: ", max_rows)
    if body.keys() != {"shared", "candidates"}:
        keys = ", ".join(map(shown, islice(body, _MAX_KEYS_SHOWN)))
        msg = f"the body has the keys {keys or '(none)'}; it needs 'rows', or 'shared' and 'candidates', and no others"
        if body and body.keys() <= RowNames(schema).known:
            msg = f"the body is one row, with the columns {keys}; put it in a list: [{{...}}]"
        raise bad_request(msg)
    shared, candidates = body["shared"], _rows(body["candidates"], "candidates: ", max_rows)
    if not isinstance(shared, dict):
        raise bad_request(f"shared: needs an object of cells by column name, not {_kind(shared)}")
    if not candidates:
        raise bad_request("candidates: needs one at least")
    shared = _named_shared(shared, schema, len(candidates))
    for index, candidate in enumerate(candidates):
        if not shared.keys().isdisjoint(candidate):
            name = next(name for name in candidate if name in shared)
            raise bad_request(in_shared_too(index, name))
    return SharedRows([(shared, candidates)])


def _named_shared(shared: Row, schema: FeatureSchema, num_candidates: int) -> Row:
    if not {column.name for column in schema.columns}.issuperset(shared):
        try:
            shared = RowNames(schema).named(shared, None)
        except RowError as error:
            raise bad_request(str(error)) from error
    if (size := _characters(shared) * num_candidates) > MAX_SHARED_CHARACTERS:
        raise too_large(
            f"shared: with {num_candidates:,} candidates it comes to {size:,} characters and values, and at most "
            f"{MAX_SHARED_CHARACTERS:,} are taken; send several requests"
        )
    return shared


def _num_values(part: Part, column: SparseColumn, keys: Collection[str]) -> int:
    shared, rows = part
    if column.name in shared:
        return len(rows) * _num_values(({}, [shared]), column, keys)
    cells = [row.get(key) for key in keys for row in rows]
    assert column.value_separator is not None
    num_in_texts = sum(1 + cell.count(column.value_separator) for cell in cells if isinstance(cell, str))
    return num_in_texts + sum(len(cell) for cell in cells if isinstance(cell, list | dict))


def _characters(row: Row) -> int:
    """Count the characters of a row's texts, and 1 for every other cell and for each value of a list or an object."""
    values = (value for cell in row.values() for value in (cell if isinstance(cell, list | dict) else (cell,)))
    return sum(1 + len(value) if isinstance(value, str) else 1 for value in values)


def describe(
    model: Mapping[str, Any],
    schema: FeatureSchema,
    examples: Examples,
    max_rows: int,
    never_missing: Collection[str] = (),
) -> dict[str, Any]:
    """Describe the columns of the model's log, in its order, with a few rows, for `GET /schema`.

    The rows are made back from encoded ones: where `unknown` names a feature, its value stands for any that is not in
    the vocabulary.
    """
    rows, unknown = examples
    columns = []
    for column in schema.columns:
        is_other_label = isinstance(column, LabelColumn) and column not in schema.learnt
        described: dict[str, Any] = {"name": column.name, "role": "ignore" if is_other_label else column.role}
        if column.header_name is not None:
            described["header_name"] = column.header_name
        if isinstance(column, LabelColumn) and not is_other_label:
            about = {"threshold": column.threshold, "positive": column.positive, "negative": column.negative}
            described |= {key: value for key, value in about.items() if value is not None}
        if column.null_values:
            described["null_values"] = column.null_values
        if isinstance(column, DenseColumn | SparseColumn):
            described["kind"] = column.kind
            described["multi_valued"] = isinstance(column, SparseColumn) and column.is_multi_valued
            described |= {"size": column.size} if is_vector(column) else {}
            if column.buckets is not None:
                described["buckets"] = column.buckets.model_dump(mode="json")
        if column.name in never_missing:
            described["never_missing"] = True
        if isinstance(column, SparseColumn) and column.value_separator is not None:
            described["value_separator"] = column.value_separator
            if column.weight_separator is not None:
                described["weight_separator"] = column.weight_separator
        columns.append(described)
    labels = [label.name for label in schema.learnt]
    return {
        **model,
        **({"labels": labels} if len(labels) > 1 else {}),
        "separator": schema.separator,
        "quote": schema.quote,
        "max_rows": max_rows,
        "columns": columns,
        "examples": [{name: _exact(cell) for name, cell in row.items()} for row in rows],
        "unknown": unknown,
    }


def _exact(cell: object) -> object:
    """Make integers text where a reader of JSON that knows only float64, such as a browser, would round them."""
    if isinstance(cell, list):
        return [_exact(value) for value in cell]
    return str(cell) if isinstance(cell, int) and abs(cell) > 2**53 else cell


def _rows(value: object, where: str, max_rows: int) -> list[Row]:
    if not isinstance(value, list):
        raise bad_request(f"{where}needs a list of rows, not {_kind(value)}")
    check_num_rows(len(value), max_rows)
    for index, row in enumerate(value):
        if not isinstance(row, dict):
            raise bad_request(f"{where}row {index}: needs an object of cells by column name, not {_kind(row)}")
    return value


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
