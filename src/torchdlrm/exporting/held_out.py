"""Rows of a dataset's held-out split, as they are stored: what an export is checked on."""

from collections.abc import Iterator

import polars as pl
import pyarrow.parquet as pq

from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import DatasetError


def held_out_split(dataset: Dataset) -> str:
    """`test`, or `val` where there is none, or `train` where nothing was held out.

    Raises:
        DatasetError: the dataset has no rows.
    """
    for name in ("test", "val", "train"):
        if name in dataset.splits and dataset.splits[name].rows:
            return name
    msg = f"{dataset.path}: the dataset has no rows to check the bundle on"
    raise DatasetError(msg)


def held_out_rows(dataset: Dataset, split: str, max_rows: int) -> Iterator[pl.DataFrame]:
    """The first rows of a split, a row group at a time: label, Float32 dense columns, Int32 sparse columns or lists."""
    left = max_rows
    for file in dataset.splits[split].files:
        parquet = pq.ParquetFile(file.path, page_checksum_verification=True)
        for group in range(parquet.num_row_groups):
            if not left:
                return
            try:
                frame = pl.DataFrame(parquet.read_row_group(group))
            except OSError as error:
                msg = f"{file.path}: row group {group} is damaged: {error}"
                raise DatasetError(msg) from error
            frame = frame.head(left)
            left -= frame.height
            yield frame
