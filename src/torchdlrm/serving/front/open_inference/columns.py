"""Converts tensors to rows: a frame of typed columns, or, for few rows, mappings by column name as in JSON.

In: one tensor a column, [N] or [N, 1]; or packed, `dense` [N, dense columns] and `sparse` [N, sparse columns].
Out: the rows; what was not sent is missing, and what a column's `null_values` name.

| column | takes |
| --- | --- |
| dense | any number, NaN is missing; or BYTES, as a log writes it |
| sparse int | integers, or BYTES |
| sparse float | any number, NaN is missing; or BYTES |
| dense vector | any numbers, [N, size], zeros for a missing one; or BYTES |
| sparse hex | integers, which are the number itself, or BYTES, its digits |
| sparse string, sparse with several values | BYTES |
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl

from torchdlrm.errors import shown
from torchdlrm.features.bad_rows import REASONS, BadRows
from torchdlrm.features.casts import without_null_values
from torchdlrm.features.cells import to_typed_columns
from torchdlrm.features.columns import DenseColumn, Feature, SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.vectors import is_vector, typed_vectors
from torchdlrm.prediction.json_rows import MAX_CELL_CHARACTERS, too_long
from torchdlrm.prediction.predictor import Rows
from torchdlrm.serving.front.open_inference.tensors import BYTES, Tensor, check_shape
from torchdlrm.serving.service.refusals import RefusedRequest, bad_request, check_num_rows, check_num_values

DENSE, SPARSE = "dense", "sparse"  # of the packed inputs
OUTPUT = "prediction"  # of the first label; that of another is OUTPUT_LABEL
PLATFORM = "torchdlrm"
_FEW_ROWS = 16


def model_metadata(name: str, version: str, schema: FeatureSchema) -> dict[str, Any]:
    """Describe the model as the protocol does: an input for each column, and an output for each label."""
    inputs = [
        {
            "name": column.name,
            "datatype": BYTES if column.is_multi_valued and not is_vector(column) else column.value_kind.datatype,
            "shape": [-1, column.size] if is_vector(column) else [-1],
        }
        for column in schema.features
    ]
    return {
        "name": name,
        "versions": [version],
        "platform": PLATFORM,
        "inputs": inputs,
        "outputs": [{"name": of, "datatype": "FP32", "shape": [-1]} for of in schema.label_columns(OUTPUT)],
    }


class Inputs:
    """The tensors of a request, each of which is placed before its data are read.

    Attributes:
        columns: which each of them holds, as far as they are placed.

    Raises:
        RefusedRequest: there is none, or more than columns.
    """

    def __init__(self, schema: FeatureSchema, max_rows: int, num_inputs: int) -> None:
        self.schema, self._max_rows = schema, max_rows
        self._features: dict[str, Feature] = {column.name: column for column in schema.features}
        self.columns: list[Sequence[Feature]] = []
        self._num_rows: int | None = None
        self._seen: set[str] = set()
        if not num_inputs:
            raise bad_request("inputs: no tensor; send one for a column at least, or 'dense' and 'sparse'")
        if num_inputs > len(self._features):
            raise bad_request(f"inputs: {num_inputs:,} tensors, and the model has {len(self._features)} columns")

    def place(self, name: str, datatype: object, shape: object) -> tuple[str, tuple[int, ...]]:
        """Return the datatype and shape of the next tensor, once they fit its columns.

        Raises:
            RefusedRequest: it is unknown or given twice, or its rows are too many or not as many as another's.
        """
        columns = self._columns_named(name)
        datatype, sizes = check_shape(name, datatype, shape)
        check_num_rows(sizes[0], self._max_rows)
        if name in self._features:
            size = columns[0].size if is_vector(columns[0]) and datatype != BYTES else 1
            if sizes[1:] != (size,) and (sizes[1:] or size != 1):
                msg = f"input {name!r}: a column has the shape {'[N] or ' * (size == 1)}[N, {size}], not {list(sizes)}"
                raise bad_request(msg)
        elif sizes[1:] != (len(columns),):
            raise bad_request(f"input {name!r}: the shape is [N, {len(columns)}], not {list(sizes)}")
        if self._num_rows is None:
            self._num_rows = sizes[0]
        elif self._num_rows != sizes[0]:
            raise bad_request(f"input {name!r} has {sizes[0]:,} rows, and the one before has {self._num_rows:,}")
        for column in columns:
            if column.name in self._seen:
                raise bad_request(f"column {column.name} is given twice")
            self._seen.add(column.name)
        self.columns.append(columns)
        return datatype, sizes

    def _columns_named(self, name: str) -> Sequence[Feature]:
        if name in self._features:
            return [self._features[name]]
        packed: dict[str, Sequence[Feature]] = {DENSE: self.schema.dense, SPARSE: self.schema.sparse_columns}
        if name not in packed:
            raise bad_request(f"input {shown(name)} is no column of this model, and neither 'dense' nor 'sparse'")
        return packed[name]


def rows_of_tensors(tensors: Sequence[Tensor], inputs: Inputs) -> Rows:
    """Return the rows that the tensors of a request hold, which `inputs` has placed.

    Returns:
        Few rows as mappings from column name to cell, which are encoded in a fraction of the time; otherwise typed
        columns in the order of the schema: first the dense, then the sparse ones.

    Raises:
        RefusedRequest: a value does not fit its column.
    """
    placed = list(zip(tensors, inputs.columns, strict=True))
    few = _few_rows(placed) if 0 < tensors[0].shape[0] <= _FEW_ROWS else None
    return _frame(placed, inputs.schema) if few is None else few


def _few_rows(placed: Sequence[tuple[Tensor, Sequence[Feature]]]) -> list[dict[str, object]] | None:
    """Return rows by column name, which are encoded in a fraction of the time.

    None where a value is not plainly one of its column: then `_frame` reads the tensors, or says what is wrong.
    """
    rows: list[dict[str, object]] = [{} for _ in range(placed[0][0].shape[0])]
    for tensor, columns in placed:
        values = tensor.values.to_list()
        for i, column in enumerate(columns):
            as_cell = _as_cell(tensor, column)
            if as_cell is None:
                return None
            try:
                for row, value in zip(rows, values[i :: len(columns)], strict=True):
                    row[column.name] = None if value is None else as_cell(value)
            except (ValueError, OverflowError):
                return None
    return rows


def _as_cell(tensor: Tensor, column: Feature) -> Callable[[Any], object] | None:
    """Return what makes a value of the tensor a cell of JSON, or raises ValueError; None where nothing does."""
    given = "text" if tensor.datatype == BYTES else "integer" if tensor.values.dtype.is_integer() else "float"
    if column.is_multi_valued or (given == "float" and not _takes_floats(column)):
        return None
    return column.value_kind.cell_of.get(given)


def _frame(placed: Sequence[tuple[Tensor, Sequence[Feature]]], schema: FeatureSchema) -> pl.DataFrame:
    num_rows = placed[0][0].shape[0]
    texts: dict[str, pl.Series] = {}
    typed: dict[str, pl.Series] = {}
    for tensor, columns in placed:
        if tensor.datatype == BYTES:
            for index, column in enumerate(columns):
                texts[column.name] = tensor.values.gather_every(len(columns), index).alias(column.name)
                _check_lengths(texts[column.name], column)
        else:
            typed |= _from_numbers(tensor, columns)
    if texts:
        layout = schema.with_columns([column for column in schema.features if column.name in texts])
        bad_rows = BadRows()
        frame, _ = to_typed_columns(pl.DataFrame(texts), layout, bad_rows, is_label_optional=True)
        for reason, examples in bad_rows.examples.items():
            raise _bad_cell(examples[0].line - 1, str(examples[0].column), reason, examples[0].value)
        typed |= frame.to_dict()
    for column in schema.features:
        if column.name not in typed:
            typed[column.name] = pl.Series(column.name, [None], dtype=column.dtype).new_from_index(0, num_rows)
    return pl.DataFrame([typed[column.name] for column in schema.features])


def _from_numbers(tensor: Tensor, columns: Sequence[Feature]) -> dict[str, pl.Series]:
    """Return the typed columns of a tensor of numbers."""
    for column in columns:
        _check_takes_numbers(tensor, column)
    if is_vector(columns[0]):
        vectors, is_bad = typed_vectors(tensor.values.reshape((tensor.shape[0], columns[0].size or 1)), columns[0])
        if is_bad.any():
            raise _bad_cell(int(is_bad.argmax()), columns[0].name, columns[0].kind, "")
        return {columns[0].name: vectors}
    num_columns = len(columns)
    if len({column.kind for column in columns}) == 1:  # cast as one: the cost of few rows is that of the casts
        parts = [(columns, tensor.values)]
    else:
        parts = [([column], tensor.values.gather_every(num_columns, i)) for i, column in enumerate(columns)]
    typed = {}
    for alike, values in parts:
        # A float32 is the bits that were sent, and not what is written with the fewest digits.
        sent = values.cast(pl.Float64) if values.dtype == pl.Float32 else values
        cast, bad = alike[0].value_kind.from_numbers(sent)
        if bad is not None:
            first = int(np.argmax(bad.to_numpy()))
            row, index = divmod(first, len(alike))
            raise _bad_cell(row, alike[index].name, alike[index].kind, values[first])
        for index, column in enumerate(alike):
            typed[column.name] = without_null_values(cast.gather_every(len(alike), index).alias(column.name), column)
    return typed


def _check_lengths(texts: pl.Series, column: Feature) -> None:
    """Check the lengths of texts and lists as those of rows in JSON are checked."""
    lengths = texts.str.len_chars()
    if (row := (lengths > MAX_CELL_CHARACTERS).arg_max()) is not None and lengths[row] > MAX_CELL_CHARACTERS:
        raise bad_request(too_long(row, column, lengths[row], "characters"))
    if isinstance(column, SparseColumn) and column.value_separator is not None:
        num_separators = texts.str.count_matches(column.value_separator, literal=True).sum()
        check_num_values(int(num_separators) + len(texts), column)


def _takes_floats(column: Feature) -> bool:
    return isinstance(column, DenseColumn) or (column.kind == "float" and not column.is_multi_valued)


def _check_takes_numbers(tensor: Tensor, column: Feature) -> None:
    if _takes_floats(column):
        return
    wanted = BYTES if column.is_multi_valued or column.value_kind.is_text else f"INT64 or {BYTES}"
    if wanted == BYTES or not tensor.values.dtype.is_integer():
        raise bad_request(f"input {tensor.name!r}: column {column.name} takes {wanted}, not {tensor.datatype}")


def _bad_cell(row: int, column: str, reason: str, value: object) -> RefusedRequest:
    msg = f"row {row}, column {column}: {REASONS[reason]}: {shown(str(value))}"
    return bad_request(msg)
