"""Looks up and pools embeddings in the mapped tables of a bundle.

The kernel is that of FBGEMM's `IntNBitTableBatchedEmbeddingBagsCodegen`, on which TorchRec's quantised
EmbeddingBagCollection stands.  It takes one buffer for all tables and an offset for each: here the buffer is the mapped
file itself, so nothing is copied and only the pages of the rows that are asked for are touched.

B rows, F sparse features, T tables (F, or more where a feature has two), D embedding dimension, M slots for vectors
(F + 1, or one more).
"""

from functools import partial
from itertools import accumulate
from typing import Any

import fbgemm_gpu.split_table_batched_embeddings_ops_inference  # noqa: F401 - registers the kernel
import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.precision import SPARSE_TYPES, row_bytes
from torchdlrm.bundle.weights_file import blocks_of
from torchdlrm.errors import DatasetError
from torchdlrm.features.tables import FeatureTable, divisors
from torchdlrm.model import projection_weight, table_weight
from torchdlrm.model.feature_vectors import feature_vectors

# Of which the kernel wants to know the widest table.
_STORED_TYPES = (SparseType.INT2, SparseType.INT4, SparseType.INT8, SparseType.FP16, SparseType.FP32)
_OUTPUT_TYPES = {torch.float32: SparseType.FP32, torch.bfloat16: SparseType.BF16}


class TableLookup:
    """The tables of a bundle.

    Args:
        bundle: opened; its weights are used in place.
        dtype: of the vectors, float32 or bfloat16.
        num_slots: M, vectors of a row of the result: the first is for the dense vector, then come the F embeddings;
            what is left stays zero.

    Raises:
        BundleError: the weights do not fit the manifest.
    """

    def __init__(self, bundle: Bundle, dtype: torch.dtype, num_slots: int) -> None:
        features, dim = bundle.manifest.sparse, bundle.manifest.model.embedding_dim
        tables = self._feature_tables = bundle.manifest.tables
        self._verifier = bundle.verifier
        self._num_rows = np.array([record.num_embeddings for record in features.values()])
        self._names = list(features)
        precisions = [features[table.feature].precision for table in tables]
        self._dim_T = [table.dim for table in tables]
        self._row_bytes = [row_bytes(*pair) for pair in zip(precisions, self._dim_T, strict=True)]
        self._starts = [bundle.weights.span(table_weight(table.key))[0] for table in tables]
        self._dim, self._dtype = dim, dtype
        self._are_plain = all(table.is_plain for table in tables)
        self._divisors = divisors(bundle.manifest.model, self._names)
        self._projections = {
            table.name: partial(linear, weight=_projection(bundle, table).to(dtype))
            for table in tables
            if table.dim < table.vector_dim
        }
        # In the slots without a feature the kernel sees one that has no ids, and writes zeros. Otherwise the embeddings
        # would have to be copied once more to make room for the dense vector.
        self._num_slots, self._num_behind = num_slots, num_slots - len(features) - 1
        assert self._num_behind >= 0, num_slots
        types = [SPARSE_TYPES[precision].as_int() for precision in precisions]
        behind = range(self._num_behind)
        dims = [dim, *self._dim_T, *(dim for _ in behind)]
        # In the slots without ids the kernel sees tables of the first one's type.
        stored = [types[0], *types, *(types[0] for _ in behind)]
        widest = {number: max(d for d, of in zip(dims, stored, strict=True) if of == number) for number in types}
        self._tables = (
            bundle.weights.data,
            torch.empty(0, dtype=torch.uint8),
            torch.full((len(dims),), EmbeddingLocation.HOST.value, dtype=torch.int32),
            torch.tensor([self._starts[0], *self._starts, *(self._starts[0] for _ in behind)]),
            torch.tensor(stored, dtype=torch.uint8),
            torch.tensor([0, *accumulate(dims)], dtype=torch.int32),
            sum(dims),
            *(widest.get(kind.as_int(), 0) for kind in _STORED_TYPES),
        )
        self._offsets: dict[int, Tensor] = {}

    def __call__(self, rows: EncodedRows) -> Tensor:
        """The vector of each feature: [B, M, D], of which [:, 0] is zero.

        Raises:
            DatasetError: an id is outside its table.
            BundleError: a block of the tables that these rows need is damaged.
        """
        looked_up = self._look_up(rows)
        shape = rows.num_rows, self._num_slots, self._dim
        if self._are_plain:
            return looked_up.view(shape)
        vectors = looked_up.new_zeros(shape)
        parts = looked_up[:, self._dim : self._dim + sum(self._dim_T)].split(self._dim_T, dim=1)
        embeddings = {table.key: part for table, part in zip(self._feature_tables, parts, strict=True)}
        for slot, vector in enumerate(feature_vectors(self._feature_tables, embeddings, self._projections), start=1):
            vectors[:, slot] = vector
        return vectors

    def pooled(self, rows: EncodedRows) -> Tensor:
        """The sums of the rows of each table, [B, sum of their dimensions]; raises as a call."""
        return self._look_up(rows)[:, self._dim : self._dim + sum(self._dim_T)].contiguous()

    def _look_up(self, rows: EncodedRows) -> Tensor:
        """[B, columns]: those of slot 0, of all tables, and of the slots behind."""
        ids, offsets = self._flat(rows)
        vectors: Tensor = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            *self._tables,
            ids,
            offsets,
            PoolingMode.SUM.value,
            None,
            _OUTPUT_TYPES[self._dtype].as_int(),
            row_alignment=1,
        )
        return vectors

    def _flat(self, rows: EncodedRows) -> tuple[Tensor, Tensor]:
        """All ids, table by table, and where each bag begins, the empty ones of slot 0 first."""
        num_rows = rows.num_rows
        if not isinstance(rows.sparse, tuple):
            ids_FB = np.ascontiguousarray(rows.sparse)
            if num_rows:
                self._check(ids_FB.min(axis=1), ids_FB.max(axis=1))
            ids_TB = ids_FB if self._are_plain else np.ascontiguousarray(rows.split(self._divisors).sparse)
            if not self._verifier.is_done:
                self._verify(ids_TB)
            offsets = self._offsets.get(num_rows)
            if offsets is None or offsets.dtype != torch.from_numpy(ids_TB).dtype:
                if len(self._offsets) > 64:  # batches of many sizes must not fill the memory
                    self._offsets.clear()
                first, behind = num_rows, self._num_behind * num_rows
                offsets = torch.from_numpy(
                    np.pad(np.arange(ids_TB.size + 1, dtype=ids_TB.dtype), (first, behind), mode="edge")
                )
                self._offsets[num_rows] = offsets
            return torch.from_numpy(ids_TB).view(-1), offsets
        empty = np.zeros(1, np.int64)
        values = [ids if ids.size else empty for ids, _ in rows.sparse]
        self._check(np.array([ids.min() for ids in values]), np.array([ids.max() for ids in values]))
        bags: Any = rows.split(self._divisors).sparse
        values = [ids.astype(np.int64, copy=False) for ids, _ in bags]
        if not self._verifier.is_done:
            self._verify(values)
        ends = np.cumsum(np.concatenate([np.diff(offsets) for _, offsets in bags]), dtype=np.int64)
        first, behind = num_rows + 1, self._num_behind * num_rows
        padded = np.pad(ends, (first, behind), constant_values=(0, ends[-1] if ends.size else 0))
        return torch.from_numpy(np.concatenate(values)), torch.from_numpy(padded)

    def _check(self, smallest_F: NDArray[np.integer], largest_F: NDArray[np.integer]) -> None:
        """The kernel itself would read past the end of a table."""
        outside = (smallest_F < 0) | (largest_F >= self._num_rows)
        if outside.any():
            feature = int(np.argmax(outside))
            wrong = smallest_F[feature] if smallest_F[feature] < 0 else largest_F[feature]
            msg = (
                f"{self._names[feature]}: id {wrong} is outside its table, which has {self._num_rows[feature]:,} rows "
                "(ids from 0)"
            )
            raise DatasetError(msg)

    def _verify(self, ids_T: NDArray[np.integer] | list[NDArray[np.int64]]) -> None:
        """Before rows are used first, their blocks are checked."""
        num_blocks = self._verifier.num_blocks
        touched = np.zeros(num_blocks, np.bool_)
        for ids, start, length in zip(ids_T, self._starts, self._row_bytes, strict=True):
            touched |= blocks_of(start + ids.astype(np.int64) * length, length, num_blocks)
        self._verifier.require(touched)


def _projection(bundle: Bundle, table: FeatureTable) -> Tensor:
    """What maps rows of a smaller table to D: [D, dim]."""
    name = projection_weight(table.key)
    bundle.weights.require(name, "F32", (table.vector_dim, table.dim))
    return bundle.weights.tensor(name)
