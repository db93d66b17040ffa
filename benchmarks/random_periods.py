"""Writes bundles of a random model as if it had learnt period after period, with the deltas between them.

In: sizes of tables.  Out: of the first period a bundle of `write_random_bundle` with vocabularies; of each other period
a bundle in which some rows of each table, the last bias, and some values of the vocabularies changed, and the delta
that leads to it.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.bench.random_bundle import write_random_bundle
from torchdlrm.bundle import TablePrecision
from torchdlrm.bundle.apply import write_delta
from torchdlrm.bundle.manifest import (
    FORMAT_VERSION,
    SAMPLE_NAME,
    WEIGHTS_NAME,
    BundleManifest,
    ServedFeature,
    StoredFile,
)
from torchdlrm.bundle.sample import PREDICTION_COLUMN
from torchdlrm.bundle.weights_file import BLOCK_BYTES, MappedWeights
from torchdlrm.config import ModelConfig
from torchdlrm.features.value_index import write_index
from torchdlrm.features.vocabulary import Vocabulary
from torchdlrm.model import table_weight
from torchdlrm.prediction.predictor import Predictor

_QUANTIZED_HEAD_BYTES = 4  # scale and bias of a row, which stay
_SAMPLE_ROWS = 20


def write_periods(
    folder: Path,
    sizes: dict[str, int],
    config: ModelConfig,
    precision: TablePrecision,
    *,
    num_periods: int,
    changed_fraction: float,
    num_values: int,
) -> None:
    """Write `0001`, `0002`, ... and `0002.delta`, ... into a folder.

    Args:
        folder: where to write.
        sizes: rows of each table, by feature.
        config: of the model.
        precision: of its tables.
        num_periods: how many.
        changed_fraction: of the rows of each table, from one period to the next.
        num_values: of each vocabulary whose ids are given to new values; as many exchange their ids with each other, as
            many are forgotten, and of a third the counts change.
    """
    before = write_random_bundle(folder / "0001", sizes, precision, config, for_raw_rows=True)
    _finish(before, BundleManifest.read(before), 1)
    for period in range(2, num_periods + 1):
        before = _write_next(before, folder / f"{period:04}", period, changed_fraction, num_values)


def _write_next(before: Path, path: Path, period: int, changed_fraction: float, num_values: int) -> Path:
    manifest, chance = BundleManifest.read(before), np.random.default_rng(period)
    path.mkdir()
    (path / WEIGHTS_NAME).write_bytes(_changed_weights(before, manifest, changed_fraction, chance).data)
    for name, record in manifest.sparse.items():
        _write_vocabulary(before, path, name, record, num_values, chance)
    _finish(path, manifest, period)
    delta = path.with_name(f"{path.name}.delta")
    delta.mkdir()
    write_delta(before, path, delta)
    return path


def _changed_weights(
    before: Path, manifest: BundleManifest, changed_fraction: float, chance: np.random.Generator
) -> NDArray[np.uint8]:
    layout, data = MappedWeights(before / WEIGHTS_NAME), np.fromfile(before / WEIGHTS_NAME, np.uint8)

    def tensor(name: str) -> NDArray[Any]:
        old = layout.tensor(name).numpy()
        return data[slice(*layout.span(name))].view(old.dtype).reshape(old.shape)

    for table in manifest.tables:
        rows = tensor(table_weight(table.key))
        ids = chance.choice(len(rows), int(changed_fraction * len(rows)), replace=False)
        if rows.dtype == np.uint8:
            rows[ids, _QUANTIZED_HEAD_BYTES:] ^= 255
        else:
            rows[ids] *= -1
    *_, last_bias = (name for name in layout.shapes if name.startswith("over_arch") and name.endswith("bias"))
    tensor(last_bias)[:] += 0.1
    return data


def _write_vocabulary(
    before: Path, path: Path, name: str, record: ServedFeature, num_values: int, chance: np.random.Generator
) -> None:
    assert record.vocabulary, f"{name} has no vocabulary"
    assert record.index, f"{name} has no index"
    table = Vocabulary.read(before / record.vocabulary, name, "hex").table
    values, counts = table["value"].to_numpy().copy(), table["count"].to_numpy().copy()
    replaced, some, others, forgotten = chance.choice(len(values), (4, num_values), replace=False)
    values[replaced] = chance.integers(2**32, size=num_values)
    values[some], values[others] = values[others], values[some]
    counts[::3] += num_values > 0
    rows = pl.DataFrame({"value": values, "count": counts, "id": table["id"]})
    rows = rows.filter(~pl.int_range(len(values), eager=True).is_in(forgotten.tolist()))
    changed = Vocabulary(name, "hex", rows.unique("value", keep="first", maintain_order=True))
    changed.write(path / record.vocabulary)
    write_index(changed, path / record.index)


def _finish(folder: Path, manifest: BundleManifest, period: int) -> None:
    """Say the period, the checksums, and what rows of a sample must give."""
    chance = np.random.default_rng(0)
    columns: dict[str, NDArray[np.generic]] = {name: chance.integers(100, size=_SAMPLE_ROWS) for name in manifest.dense}
    for name, record in manifest.sparse.items():
        assert record.vocabulary, f"{name} has no vocabulary"
        known = Vocabulary.read(folder / record.vocabulary, name, "hex").table["value"].to_numpy()
        columns[name] = chance.choice(known, _SAMPLE_ROWS)
    data = memoryview((folder / WEIGHTS_NAME).read_bytes())
    blocks = (data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES))
    block_sha256 = tuple(hashlib.sha256(block).hexdigest() for block in blocks)
    files = {name: StoredFile.of(folder / name) for name in sorted(manifest.files.keys() - {SAMPLE_NAME})}
    update = {"period": period, "format_version": FORMAT_VERSION, "block_sha256": block_sha256, "files": files}
    manifest = manifest.model_copy(update=update)
    manifest.write(folder)
    predictor = Predictor.open(folder, verify="lazy")
    frame = pl.DataFrame(columns)
    predicted = predictor.predict_encoded(predictor.encode(frame)).probabilities
    frame.with_columns(pl.Series(PREDICTION_COLUMN, predicted)).write_parquet(folder / SAMPLE_NAME)
    files[SAMPLE_NAME] = StoredFile.of(folder / SAMPLE_NAME)
    manifest.model_copy(update={"files": files}).write(folder)
