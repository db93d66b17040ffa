"""Looks up and pools embeddings in the mapped tables of a bundle.

The kernel is that of FBGEMM's `IntNBitTableBatchedEmbeddingBagsCodegen`, on which TorchRec's quantised
EmbeddingBagCollection stands.  It takes one buffer for all tables and an offset for each: here the buffer is the mapped
file itself, so nothing is copied and only the pages of the rows that are asked for are touched.

B rows, F sparse features, D embedding dimension, M slots for vectors (F + 1, or one more).
"""

import fbgemm_gpu.split_table_batched_embeddings_ops_inference  # noqa: F401 - registers the kernel
import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from numpy.typing import NDArray
from torch import Tensor

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.precision import SPARSE_TYPES, row_bytes
from torchdlrm.bundle.weights_file import blocks_of
from torchdlrm.errors import DatasetError
from torchdlrm.model import table_weight

_OUTPUT_TYPES = {torch.float32: SparseType.FP32, torch.bfloat16: SparseType.BF16}


class TableLookup:
    """The tables of a bundle.

    Args:
        bundle: opened; its weights are used in place.
        dtype: of the vectors, float32 or bfloat16.
        num_slots: M, vectors of a row of the result: the first is for the dense vector, then come the F embeddings;
            what is left stays zero.
    """

    def __init__(self, bundle: Bundle, dtype: torch.dtype, num_slots: int) -> None:
        features, dim = bundle.manifest.sparse, bundle.manifest.model.embedding_dim
        self._verifier = bundle.verifier
        self._num_rows = np.array([record.num_embeddings for record in features.values()])
        self._names = list(features)
        self._row_bytes = [row_bytes(record.precision, dim) for record in features.values()]
        self._starts = [bundle.weights.span(table_weight(name))[0] for name in features]
        self._dim, self._dtype = dim, dtype
        # In the slots without a feature the kernel sees one that has no ids, and writes zeros. Otherwise the embeddings
        # would have to be copied once more to make room for the dense vector.
        self._num_slots, self._num_behind = num_slots, num_slots - len(features) - 1
        assert self._num_behind >= 0, num_slots
        types = [SPARSE_TYPES[record.precision].as_int() for record in features.values()]
        behind = range(self._num_behind)
        self._tables = (
            bundle.weights.data,
            torch.empty(0, dtype=torch.uint8),
            torch.full((num_slots,), EmbeddingLocation.HOST.value, dtype=torch.int32),
            torch.tensor([self._starts[0], *self._starts, *(self._starts[0] for _ in behind)]),
            torch.tensor([types[0], *types, *(types[0] for _ in behind)], dtype=torch.uint8),
            torch.arange(num_slots + 1, dtype=torch.int32) * dim,
            num_slots * dim,
            *(dim if bits in types else 0 for bits in (SparseType.INT2.as_int(), SparseType.INT4.as_int())),
            *(dim if bits in types else 0 for bits in (SparseType.INT8.as_int(), SparseType.FP16.as_int())),
            dim if SparseType.FP32.as_int() in types else 0,
        )
        self._offsets: dict[int, Tensor] = {}

    def __call__(self, rows: EncodedRows) -> Tensor:
        """The sum of each feature's embeddings: [B, M, D], of which [:, 0] is zero.

        Raises:
            DatasetError: an id is outside its table.
            BundleError: a block of the tables that these rows need is damaged.
        """
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
        return vectors.view(rows.num_rows, self._num_slots, self._dim)

    def _flat(self, rows: EncodedRows) -> tuple[Tensor, Tensor]:
        """All ids, feature by feature, and where each bag begins, the empty ones of slot 0 first."""
        num_rows = rows.num_rows
        if not isinstance(rows.sparse, tuple):
            ids_FB = np.ascontiguousarray(rows.sparse)
            if num_rows:
                self._check(ids_FB.min(axis=1), ids_FB.max(axis=1))
            if not self._verifier.is_done:
                self._verify(ids_FB)
            offsets = self._offsets.get(num_rows)
            if offsets is None or offsets.dtype != torch.from_numpy(ids_FB).dtype:
                if len(self._offsets) > 64:  # batches of many sizes must not fill the memory
                    self._offsets.clear()
                first, behind = num_rows, self._num_behind * num_rows
                offsets = torch.from_numpy(
                    np.pad(np.arange(ids_FB.size + 1, dtype=ids_FB.dtype), (first, behind), mode="edge")
                )
                self._offsets[num_rows] = offsets
            return torch.from_numpy(ids_FB).view(-1), offsets
        values = [ids.astype(np.int64, copy=False) for ids, _ in rows.sparse]
        empty = np.zeros(1, np.int64)
        self._check(
            np.array([(ids if ids.size else empty).min() for ids in values]),
            np.array([(ids if ids.size else empty).max() for ids in values]),
        )
        if not self._verifier.is_done:
            self._verify(values)
        ends = np.cumsum(np.concatenate([np.diff(offsets) for _, offsets in rows.sparse]), dtype=np.int64)
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

    def _verify(self, ids_F: NDArray[np.integer] | list[NDArray[np.int64]]) -> None:
        """Before rows are used first, their blocks are checked."""
        num_blocks = self._verifier.num_blocks
        touched = np.zeros(num_blocks, np.bool_)
        for ids, start, length in zip(ids_F, self._starts, self._row_bytes, strict=True):
            touched |= blocks_of(start + ids.astype(np.int64) * length, length, num_blocks)
        self._verifier.require(touched)
