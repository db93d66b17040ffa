"""Describes the tables of a plan: their names, their sizes, and how often a row of the batch looks into them.

In: a preset by name, a file, or the rows of each feature.  Out: `Table`s, which know their bytes under a precision and
an optimizer.  No torch in here.
"""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torchdlrm.config import ModelConfig, TableOptimizer
from torchdlrm.errors import PlanError
from torchdlrm.features.tables import Feature, FeatureTable, feature_tables, table_name
from torchdlrm.synthetic.shapes import MULTI_HOT_SIZES

Precision = Literal["float32", "float16"]
BYTES_PER_VALUE: Mapping[Precision, int] = {"float32": 4, "float16": 2}

# Sizes by column: the logs' vocabularies, as facebookresearch/dlrm and MLPerf publish them.
_KAGGLE_ROWS = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
_TERABYTE_40M_ROWS = (
    *(40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10),
    *(2209, 11938, 155, 4, 976, 14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36),
)
_PRESETS: Mapping[str, tuple[Sequence[int], Sequence[int], str]] = {
    "criteo-kaggle": (_KAGGLE_ROWS, (1,) * 26, "Kaggle display advertising, whole vocabulary"),
    "criteo-1tb": (_TERABYTE_40M_ROWS, (1,) * 26, "1TB click logs, at most 40 million rows a table (MLPerf's list)"),
    "criteo-1tb-40m": ((40_000_000,) * 26, (1,) * 26, "26 tables of 40 million rows: why tables are sharded"),
    "mlperf-dcnv2": (_TERABYTE_40M_ROWS, MULTI_HOT_SIZES, "MLPerf DLRM-DCNv2: criteo-1tb with multi-hot features"),
}
PRESETS = tuple(_PRESETS)
MAX_ROWS = 2**40  # beyond any machine: a typing error, and bytes would no longer fit 63 bits


@dataclass(frozen=True)
class Table:
    """An embedding table.

    Attributes:
        name: of the table; a dataset's feature `cat_0` has the table `t_cat_0`.
        rows: number of embeddings.
        dim: values of each embedding, a multiple of 4 (FBGEMM's rows).
        pooling_factor: ids that a row of the batch looks up in it, on average.
    """

    name: str
    rows: int
    dim: int
    pooling_factor: float = 1.0

    def size_bytes(self, precision: Precision, optimizer: TableOptimizer) -> int:
        """Bytes of the weights, and of the optimizer's state while the table is not cut by columns."""
        return self.rows * self.dim * BYTES_PER_VALUE[precision] + state_bytes(self.rows, self.dim, optimizer)


def state_bytes(rows: int, columns: int, optimizer: TableOptimizer) -> int:
    """Bytes of the optimizer's state for a shard of a table, float32.

    Row-wise optimizers keep a value a row of every shard, so a table that is cut by columns has several a row.
    """
    return 4 * rows * columns * optimizer.state_per_weight + row_state_bytes(rows, optimizer)


def row_state_bytes(rows: int, optimizer: TableOptimizer) -> int:
    """Bytes of that part of the state of which there is one value a row."""
    return 4 * rows * optimizer.state_per_row


def tables_of_model(tables: Sequence[FeatureTable]) -> list[Table]:
    """The tables into which all keys look, as `torchdlrm.model.build` makes them."""
    num_keys = Counter(table.name for table in tables)
    return [
        Table(table.name, table.rows, table.dim, float(num_keys[table.name]))
        for table in {table.name: table for table in tables}.values()
    ]


def with_features(tables: Sequence[Table], model: ModelConfig) -> list[Table]:
    """The same tables, of which `model.features` makes some smaller and others two."""
    found = []
    for table in tables:
        feature = feature_of(table)
        if feature not in model.features:
            found.append(table)
            continue
        for part in feature_tables(model, [Feature(feature, table.rows)]):
            name = table.name + part.table_key.removeprefix(feature)
            found.append(replace(table, name=name, rows=part.rows, dim=part.dim))
    return found


def feature_of(table: Table) -> str:
    """The feature whose table it is."""
    return table.name.removeprefix(table_name(""))


def features_of(tables: Sequence[Table], model: ModelConfig) -> dict[str, int]:
    """Ids of each feature; of one that has two tables already, as many as its quotients allow."""
    divided = {name: chosen.num_collisions for name, chosen in model.features.items() if chosen.quotient_remainder}
    parts = {f"{name}_{part}": (name, part) for name in divided for part in "qr"}
    found = {}
    for table in tables:
        name, part = parts.get(feature_of(table), (feature_of(table), ""))
        if part != "r" and "@" not in name:  # which are of groups
            found[name] = table.rows * (divided[name] if part else 1)
    return found


def preset_tables(name: str, dim: int) -> list[Table]:
    """Return the tables of a published model, called as those of the `criteo` schema.

    Raises:
        PlanError: no preset has this name.
    """
    if name not in _PRESETS:
        known = "; ".join(f"{preset} ({about})" for preset, (_, _, about) in _PRESETS.items())
        raise PlanError(f"`tables`: there is no preset and no file {name!r}; presets are {known}")
    rows, pooling_factors, _ = _PRESETS[name]
    sizes = enumerate(zip(rows, pooling_factors, strict=True))
    return [Table(table_name(f"cat_{i}"), num_rows, dim, float(pooled)) for i, (num_rows, pooled) in sizes]


def read_tables(path: Path, dim: int) -> list[Table]:
    """Read tables from a CSV file with a header, or a JSON list of objects.

    Columns or keys: `rows`; optionally `name` (t_0, t_1, ... when missing), `dim` (the given one when missing) and
    `pooling_factor` (1 when missing).

    Raises:
        PlanError: the file cannot be read, or a value is wrong; the first few problems in one message.
    """
    try:
        text = path.read_text(encoding="utf-8")
        records: Any = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanError(f"`tables`: cannot read {path}: {error}; expected CSV with a header, or a JSON list") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        msg = f"`tables`: {path}: expected a list of objects with rows, and optionally name, dim, pooling_factor"
        raise PlanError(msg)
    problems: list[str] = []
    tables = [_read_table(record, index, dim, problems) for index, record in enumerate(records)]
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise PlanError("\n  ".join([f"`tables`: {path} is wrong:", *problems[:5], *more]))
    check_tables(tables, str(path))
    return tables


def _read_table(record: Mapping[str, Any], index: int, dim: int, problems: list[str]) -> Table:
    place = f"table {index + 1}"
    unknown = sorted(str(key) for key in set(record) - {"name", "rows", "dim", "pooling_factor"})
    if unknown:
        problems.append(f"{place}: {', '.join(unknown)}: not one of name, rows, dim, pooling_factor")
    numbers: dict[str, float] = {}
    for key, default in (("rows", None), ("dim", dim), ("pooling_factor", 1)):
        value = record.get(key)
        value = default if value in {None, ""} else value
        try:
            numbers[key] = float(value) if key == "pooling_factor" else int(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            problems.append(f"{place}: {key}: expected a number, got {value!r}")
            numbers[key] = 4
    return Table(
        str(record.get("name") or f"t_{index}"), int(numbers["rows"]), int(numbers["dim"]), numbers["pooling_factor"]
    )


def check_tables(tables: Sequence[Table], place: str) -> None:
    """Refuse sizes that no table can have.

    Raises:
        PlanError: a table is empty, negative or absurd, or two have the same name; every problem in one message.
    """
    problems = [] if tables else ["there is no table"]
    seen: set[str] = set()
    for table in tables:
        if table.name in seen:
            problems.append(f"{table.name}: two tables have this name")
        seen.add(table.name)
        if not 1 <= table.rows <= MAX_ROWS:
            problems.append(f"{table.name}: rows must be from 1 to {MAX_ROWS:,}, got {table.rows:,}")
        if table.dim < 4 or table.dim % 4 or table.dim > 8192:
            problems.append(f"{table.name}: dim must be a multiple of 4 from 4 to 8192, got {table.dim}")
        if not 0 < table.pooling_factor <= 1e6:
            problems.append(f"{table.name}: pooling_factor must be above 0, got {table.pooling_factor:g}")
    if problems:
        raise PlanError("\n".join([f"the tables of {place} are wrong:", *(f"  {problem}" for problem in problems)]))


def cap_embeddings(tables: Sequence[Table], max_embeddings: int) -> list[Table]:
    """Return the same tables with at most `max_embeddings` rows each."""
    return [replace(table, rows=min(table.rows, max_embeddings)) for table in tables]
