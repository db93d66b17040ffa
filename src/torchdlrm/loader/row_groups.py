"""Decodes the row groups of a split: Parquet on disk -> columns in memory, their ids checked against their tables.

Of a dataset at a URL, a part is fetched when its first row group is read, and the parts that follow while it is read.
"""

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import DatasetError
from torchdlrm.features.tables import FeatureTable, from_the_end
from torchdlrm.loader.batch import RowGroup, epoch_order
from torchdlrm.storage import mirror, reading

_PARTS_AHEAD, _GROUPS_AHEAD = 2, 192
_threads = ThreadPoolExecutor(_PARTS_AHEAD, thread_name_prefix="torchdlrm-fetch")


@dataclass(frozen=True)
class IdColumn:
    """The ids of one feature in one row group.

    Attributes:
        values: int32, the ids of all rows one after the other.
        offsets: where each row's ids begin, int32 [n + 1]; None when every row has exactly one.
        weights: of the ids, float32; None where they have none.
    """

    values: NDArray[np.int32]
    offsets: NDArray[np.int32] | None
    weights: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, column: Any, weights: Any | None = None) -> "IdColumn":
        """A column of Arrow, of integers or of lists of them, and perhaps lists of their weights.

        Raises:
            ValueError: the lists of weights have other lengths.
        """
        array = _one_array(column)
        if not pa.types.is_list(array.type):
            return cls(array.to_numpy(zero_copy_only=False), None)
        values, offsets = array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()
        if weights is None:
            return cls(values, offsets)
        lists = _one_array(weights)
        if not np.array_equal(offsets, lists.offsets.to_numpy()):
            raise ValueError("a row has another number of weights than of ids")
        return cls(values, offsets, lists.values.to_numpy(zero_copy_only=False))

    def part(self, rows: slice) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """A copy of the ids of these rows, and how many each row has."""
        if self.offsets is None:
            ids = self.values[rows].astype(np.int64)
            return ids, np.ones(len(ids), dtype=np.int32)
        offsets = self.offsets[rows.start : rows.stop + 1]
        return self.values[offsets[0] : offsets[-1]].astype(np.int64), np.diff(offsets).astype(np.int32)

    def of_key(self, table: FeatureTable) -> "IdColumn":
        """What a key has of the feature's ids, as rows of its table."""
        if table.position is None:
            return replace(self, values=table.ids(self.values))
        offsets = np.arange(len(self.values) + 1, dtype=np.int32) if self.offsets is None else self.offsets
        places, offsets = from_the_end(offsets, table.position)
        weights = None if self.weights is None else self.weights[places]
        return IdColumn(table.ids(self.values[places]), offsets, weights)

    def weights_of(self, rows: slice) -> NDArray[np.float32]:
        """A copy of the weights of the ids of these rows: 1 where they have none."""
        if self.weights is not None and self.offsets is not None:
            return self.weights[self.offsets[rows.start] : self.offsets[rows.stop]].copy()
        begin, end = (rows.start, rows.stop) if self.offsets is None else self.offsets[[rows.start, rows.stop]]
        return np.ones(end - begin, np.float32)

    def row_of(self, position: int) -> int:
        """The row that the id at this position of `values` belongs to."""
        return position if self.offsets is None else int(np.searchsorted(self.offsets, position, side="right")) - 1


@dataclass(frozen=True)
class Columns:
    """The n rows of one row group.

    Attributes:
        labels: [n]; of L labels [n, L].
        dense: float32 [n] for each dense feature.
        ids: of each sparse feature.
        row_weights: float32 [n]; None where rows have none.
        vectors: floats [n, size] of each column of vectors.
    """

    labels: NDArray[Any]
    dense: Sequence[NDArray[np.float32]]
    ids: Sequence[IdColumn]
    row_weights: NDArray[np.float32] | None = None
    vectors: Sequence[NDArray[Any]] = ()

    def of_keys(self, sources: Sequence[tuple[int, FeatureTable]]) -> "Columns":
        """The same rows with a column of ids for each key; from `features.tables.sources`."""
        return replace(self, ids=[self.ids[place].of_key(table) for place, table in sources])

    def find_outside(self, num_embeddings: Mapping[str, int]) -> tuple[str, int, int] | None:
        """The first feature that has an id outside its table, with that id and its row in the group; None is well."""
        for column, (name, rows) in zip(self.ids, num_embeddings.items(), strict=True):
            values = column.values
            # Without a sign a negative id is one of the largest: one pass finds both.
            if values.size and values.view(f"u{values.itemsize}").max() >= rows:
                position = int(np.argmax((values < 0) | (values >= rows)))
                return name, int(values[position]), column.row_of(position)
        return None


def _one_array(column: Any) -> Any:
    """A row group's column is in one piece, which asking for it does not copy."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


class RowGroupReader:
    """Opens the files of a split and decodes their row groups, for one thread.

    Args:
        dataset: an encoded dataset.
        split: one of its splits.
        seed: of the order of row groups in later epochs.

    Attributes:
        row_groups: in the order of the files.
        num_dense: number of dense features.
        vector_sizes: numbers of a vector of each column that has some.
        feature_names: of the sparse features.
        num_labels: L, labels that are learnt.
        has_row_weights: whether rows have weights.
        has_weights: of each sparse feature whether its ids have weights.
    """

    def __init__(self, dataset: Dataset, split: str, *, seed: int) -> None:
        self._dataset, self._seed = dataset, seed
        self._order: tuple[int, list[RowGroup]] | None = None
        files, most_rows = dataset.splits[split].files, dataset.manifest.row_group_rows
        self._paths = [file.path for file in files]
        self._num_embeddings = dataset.num_embeddings
        self._open: tuple[int, Any] | None = None
        self.num_dense, self.feature_names = len(dataset.dense_names), dataset.sparse_names
        self.num_labels = len(dataset.schema.learnt)
        self.vector_sizes = [column.size or 0 for column in dataset.schema.content]
        self.has_row_weights = dataset.weight_name is not None
        self.has_weights = tuple(feature.weights_name is not None for feature in dataset.schema.sparse)
        self.row_groups = [
            RowGroup(file_index, group, min(most_rows, file.rows - first_row))
            for file_index, file in enumerate(files)
            for group, first_row in enumerate(range(0, file.rows, most_rows))
        ]

    def another(self) -> "RowGroupReader":
        """A reader of the same files for another thread."""
        other = copy.copy(self)
        other._open = None
        return other

    def order(self, epoch: int) -> list[RowGroup]:
        """The row groups in the order in which that epoch reads them."""
        known = self._order
        if known is None or known[0] != epoch:
            known = (epoch, epoch_order(self.row_groups, epoch=epoch, seed=self._seed))
            self._order = known
        return known[1]

    def read(self, epoch: int, index: int) -> Columns:
        """Decode the row group at a place of an epoch's order.

        Raises:
            DatasetError: it is damaged, or an id is outside its table.
        """
        where = self.order(epoch)[index]
        path = self._paths[where.file_index]
        if self._open is None or self._open[0] != where.file_index:
            try:
                file = pq.ParquetFile(mirror.fetch_missing(path), page_checksum_verification=True)
            except (OSError, ValueError) as error:
                raise DatasetError(f"{path}: cannot be read: {error}; run dlrm preprocess again") from error
            self._open = (where.file_index, file)
            self._fetch_ahead(self.order(epoch)[index : index + _GROUPS_AHEAD])
        try:
            # One thread: this already runs during the step, which wants the other cores.
            table = self._open[1].read_row_group(where.group_index, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"{path}: row group {where.group_index} is damaged: {error}") from error
        if table.num_rows != where.rows:
            msg = f"{path}: row group {where.group_index} has {table.num_rows:,} rows, and not {where.rows:,} as "
            msg += "dataset.json says; run dlrm preprocess again"
            raise DatasetError(msg)

        def numbers(name: str) -> NDArray[Any]:
            return np.asarray(_one_array(table.column(name)).to_numpy(zero_copy_only=False))

        try:
            ids = [
                IdColumn.of(*(table.column(name) for name in feature.encoded_names))
                for feature in self._dataset.schema.sparse
            ]
            lists = [_one_array(table.column(column.name)) for column in self._dataset.schema.content]
            vectors = [found.flatten().to_numpy().reshape(where.rows, -1) for found in lists]
        except ValueError as error:
            raise DatasetError(f"{path}: row group {where.group_index}: {error}; run dlrm preprocess again") from error
        labels = [numbers(label.name) for label in self._dataset.schema.learnt]
        columns = Columns(
            labels[0] if len(labels) == 1 else np.stack(labels, axis=1),
            [numbers(name) for name in self._dataset.dense_names],
            ids,
            None if self._dataset.weight_name is None else numbers(self._dataset.weight_name),
            vectors,
        )
        # Checksums hold only what preprocessing wrote, and files may come from elsewhere. FBGEMM would read and write
        # past the end of the table: a crash, or worse, none. 26 columns of a row group take less than a millisecond.
        found = columns.find_outside(self._num_embeddings)
        if found is not None:
            feature, value, row = found
            raise DatasetError(
                f"{path}: row group {where.group_index}, row {row}: {feature} has the id {value}, but its table has "
                f"{self._num_embeddings[feature]:,} rows (ids from 0, num_embeddings in dataset.json); run dlrm "
                "preprocess again"
            )
        return columns

    def _fetch_ahead(self, groups: Sequence[RowGroup]) -> None:
        """Let threads fetch the parts of the row groups behind the first; errors are the reader's to meet.

        All ranks of this host do so: a part is fetched once between them.
        """
        paths = [self._paths[index] for index in dict.fromkeys(group.file_index for group in groups)]
        for path in paths[1 : 1 + _PARTS_AHEAD]:
            if not path.exists():
                _threads.submit(mirror.fetch_missing, path)

    def most_ids(self) -> list[int | None]:
        """Of each sparse feature the most ids in a row group where rows have several, else None.

        As the files' footers say it: nothing is decoded.
        """
        found: dict[str, int | None] = dict.fromkeys(self.feature_names)
        for path in self._paths if any(feature.is_multi_valued for feature in self._dataset.schema.sparse) else ():
            with reading.open_to_read(path) as file:
                metadata = pq.read_metadata(file)
            for leaf, field in enumerate(metadata.schema.to_arrow_schema()):
                if pa.types.is_list(field.type) and field.name in found:
                    groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
                    counts = [group.column(leaf).num_values for group in groups]
                    found[field.name] = max([found[field.name] or 0, *counts])
        return list(found.values())
