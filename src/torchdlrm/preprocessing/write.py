"""Task: the rows of a part from all groups -> a part file of the dataset."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from torchdlrm.data import shuffle
from torchdlrm.data.dataset import write_part
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.preprocessing.encode import POSITION
from torchdlrm.preprocessing.work_folder import Result


def write_rows(
    groups: Sequence[tuple[Path, int]],
    shuffle_seed: int | None,
    schema: FeatureSchema,
    num_embeddings: Mapping[str, int],
    folder: Path,
    name: str,
) -> Result:
    """Task: gather the rows of a part and write them as `folder/name`.

    Args:
        groups: the files of groups in the order of the log, and in each the number of the batch that holds the part.
        shuffle_seed: the seed of their order; None keeps that of the log.
        schema: the columns.
        num_embeddings: rows of each feature's table.
        folder: the dataset.
        name: the file in it.
    """
    batches = []
    for path, number in groups:
        with pa.memory_map(str(path), "r") as file:
            batches.append(pa.ipc.open_file(file).get_batch(number))
    order: pl.Series | None = None
    if shuffle_seed is not None:
        positions = np.concatenate([batch.column(POSITION).to_numpy() for batch in batches])
        order = pl.Series(shuffle.order_in_bucket(positions, shuffle_seed))
    columns = []
    for column in (schema.label, *schema.features):
        values = pl.Series(column.name, pa.chunked_array([batch.column(column.name) for batch in batches]))
        values = values.rechunk() if order is None else values.rechunk().gather(order)
        if column in schema.sparse:
            values = values.cast(pl.List(pl.Int32) if values.dtype == pl.List else pl.Int32)
        columns.append(values)
    record = write_part(pl.DataFrame(columns), schema, num_embeddings, folder, name)
    return record.model_dump()
