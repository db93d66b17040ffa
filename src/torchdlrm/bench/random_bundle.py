"""Writes a bundle of a model with random weights, and a log of raw rows that it can predict.

In: the rows of each table.  Out: a bundle's folder; and text in Criteo's layout whose values the bundle's vocabularies
have, uniform over them, which is the hardest case for the caches.
"""

from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchdlrm.bundle import TablePrecision
from torchdlrm.bundle.manifest import (
    WEIGHTS_NAME,
    BundleManifest,
    Origin,
    ServedFeature,
    StoredFile,
    oldest_version,
)
from torchdlrm.bundle.weights_file import BLOCK_BYTES
from torchdlrm.bundle.write import write_weights
from torchdlrm.config import ModelConfig
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.kinds import hex_digits
from torchdlrm.features.schema import NUM_CRITEO_DENSE, FeatureSchema
from torchdlrm.features.tables import features_of_sizes
from torchdlrm.features.transforms import TRANSFORMS
from torchdlrm.features.value_index import write_index
from torchdlrm.features.vocabulary import Vocabulary, number_values, rank_counts
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.build import build_model
from torchdlrm.progress import SILENT

_DENSE = [f"int_{i}" for i in range(NUM_CRITEO_DENSE)]
_MISSING_FRACTION = 0.1  # of Criteo's cells about as many are empty
_MAX_COUNT = 1000


class _RandomWeights:
    """Weights as a fresh model has them; rows of tables are drawn when they are asked for."""

    def __init__(self, sizes: dict[str, int], config: ModelConfig) -> None:
        torch.manual_seed(0)
        shape = ModelShape(config, NUM_CRITEO_DENSE, len(sizes), known_features=features_of_sizes(sizes))
        model = build_model(shape, torch.device("cpu")).model
        self._weights = model.state_dict()
        self.shapes = {name: tuple(weight.shape) for name, weight in self._weights.items()}

    def tensor(self, name: str) -> Tensor:
        return self._weights[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        num_rows, dim = self.shapes[name]
        generator = torch.Generator().manual_seed(start)
        return (torch.rand(stop - start, dim, generator=generator) * 2 - 1) / num_rows**0.5


def write_random_bundle(
    path: Path,
    sizes: dict[str, int],
    precision: TablePrecision,
    config: ModelConfig | None = None,
    *,
    for_raw_rows: bool = False,
) -> Path:
    """Write a bundle with tables of these sizes at `path`, where nothing may be.

    `config` is the paper's model when not given.

    `for_raw_rows` gives it a vocabulary of each feature, for rows of `write_random_log`; otherwise its values are ids.
    """
    path.mkdir()
    config = config or ModelConfig()
    weights = _RandomWeights(sizes, config)
    stored, block_sha256 = write_weights(weights, dict.fromkeys(sizes, precision), path / WEIGHTS_NAME, SILENT)
    files = {WEIGHTS_NAME: stored}
    sparse = {
        name: ServedFeature(num_embeddings=rows, precision=precision, vocabulary=None) for name, rows in sizes.items()
    }
    if for_raw_rows:
        for name, rows in sizes.items():
            table, index = f"{name}.parquet", f"{name}.index"
            values = pl.Series(_values(rows))
            counts = pl.DataFrame({"value": values, "count": np.ones(len(values), np.int64)})
            vocabulary = Vocabulary(name, "hex", number_values(rank_counts(counts)))
            vocabulary.write(path / table)
            write_index(vocabulary, path / index)
            files |= {file: StoredFile.of(path / file) for file in (table, index)}
            sparse[name] = sparse[name].model_copy(update={"vocabulary": table, "index": index})
    dense = [
        DenseColumn(name=name, kind="int", transform="log_plus_3")
        if for_raw_rows
        else DenseColumn(name=name, transform="none")
        for name in _DENSE
    ]
    columns = (
        LabelColumn(name="label"),
        *dense,
        *(SparseColumn(name=name, kind="hex" if for_raw_rows else "int") for name in sizes),
    )
    schema = FeatureSchema(name="random", columns=columns)
    manifest = BundleManifest(
        name="random",
        feature_schema=schema,
        dense={column.name: TRANSFORMS[column.transform].fit(None) for column in dense},
        sparse=sparse,
        format_version=oldest_version(schema, config, None),
        model=config,
        dense_precision="float32",
        source=Origin(run="random", step=0, dataset_sha256="", versions={}),
        check=None,
        files=files,
        block_bytes=BLOCK_BYTES,
        block_sha256=block_sha256,
    )
    manifest.write(path)
    return path


def write_random_log(path: Path, sizes: dict[str, int], num_rows: int) -> Path:
    """Write rows of text in Criteo's layout, with labels, for a bundle of these `sizes` that is `for_raw_rows`."""
    generator = np.random.default_rng(0)

    def some(values: pl.Series) -> pl.Series:
        return values.zip_with(pl.Series(generator.random(num_rows) >= _MISSING_FRACTION), values.clear(1))

    columns = {"label": pl.Series(generator.integers(2, size=num_rows))}
    for name in _DENSE:
        columns[name] = some(pl.Series(generator.integers(_MAX_COUNT, size=num_rows)))
    for name, rows in sizes.items():
        columns[name] = some(hex_digits(pl.Series(generator.choice(_values(rows), num_rows))))
    pl.DataFrame(columns).write_csv(path, separator="\t", include_header=False)
    return path


def _values(num_embeddings: int) -> NDArray[np.uint32]:
    """A value for each row of a table but that of the unknown: distinct, and spread as hashes are."""
    return np.arange(1, num_embeddings, dtype=np.uint32) * np.uint32(0x9E3779B1)
