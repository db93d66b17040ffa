"""Looks up and pools embeddings in the mapped tables of a bundle.

The kernel is that of FBGEMM's `IntNBitTableBatchedEmbeddingBagsCodegen`, on which TorchRec's quantised
EmbeddingBagCollection stands.  It takes one buffer for all tables and an offset for each: here the buffer is the mapped
file itself, so nothing is copied and only the pages of the rows that are asked for are touched; of weights that a delta
has changed in memory it is their address range.

B rows, F sparse features, T keys (F, or more where a feature has several: R of them are no feature's vector), D
embedding dimension, M slots for vectors (F + 1, or one more).
"""

from collections.abc import Sequence
from itertools import accumulate

import fbgemm_gpu.split_table_batched_embeddings_ops_inference  # noqa: F401 - registers the kernel
import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.patched_weights import PatchedWeights
from torchdlrm.bundle.precision import TABLE_PRECISIONS
from torchdlrm.bundle.weights_file import blocks_of
from torchdlrm.errors import DatasetError
from torchdlrm.features.tables import FeatureTable, sources, table_name
from torchdlrm.model import projection_weight, table_weight
from torchdlrm.model.pooling import pooled_features, pooling_of

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
        self._verifier = bundle.verifier
        self._num_rows = np.array([record.num_embeddings for record in features.values()])
        self._names, self._dim, self._dtype = list(features), dim, dtype
        # What features' vectors begin with, in the order of the slots, then remainders and the like.
        of_all = bundle.manifest.tables
        tables = sorted(of_all, key=lambda table: not table.is_vector)
        self._sources = sources(tables, self._names)
        stored = (TABLE_PRECISIONS[features[table.feature].precision] for table in tables)
        types_T = [SparseType[precision.fbgemm_name].as_int() for precision in stored]
        names = [table_weight(table.table_key) for table in tables]
        self._places = [bundle.weights.place(name) for name in names]
        self._numbers = bundle.weights.numbers(names) if isinstance(bundle.weights, PatchedWeights) else None
        # What the kernel sees: where a table begins in the buffer, its type, its dimension, whether it has ids. Of what
        # has none it writes zeros: in the slot of the dense vector, behind a row that is smaller than D, in slots
        # behind. Otherwise the embeddings would have to be copied once more to make room.
        starts_T = [place.start for place in self._places]
        no_ids = (starts_T[0], types_T[0])
        names_of_slots = ["", *self._names, *range(num_slots - len(features) - 1)]
        slots = {name: [(*no_ids, dim, False)] for name in names_of_slots}
        assert len(slots) == num_slots, num_slots
        slot_of = {table.key: table.feature if table.is_vector else table.key for table in tables}
        for start, kind, table in zip(starts_T, types_T, tables, strict=True):
            rest = [(*no_ids, -table.dim % dim, False)] * (table.dim % dim > 0)
            slots[slot_of[table.key]] = [(start, kind, table.dim, True), *rest]
        seen = [part for parts in slots.values() for part in parts]
        starts, types, dims, has_ids = (list(column) for column in zip(*seen, strict=True))
        self._num_slots, self._has_ids = num_slots, np.array(has_ids)
        self._tables = (
            bundle.weights.data,
            torch.empty(0, dtype=torch.uint8),
            torch.full((len(seen),), EmbeddingLocation.HOST.value, dtype=torch.int32),
            torch.tensor(starts),
            torch.tensor(types, dtype=torch.uint8),
            torch.tensor([0, *accumulate(dims)], dtype=torch.int32),
            sum(dims),
            *(
                max((d for d, of in zip(dims, types, strict=True) if of == t.as_int()), default=0)
                for t in _STORED_TYPES
            ),
        )
        self._offsets: dict[int, Tensor] = {}
        # Of all keys in the order of the manifest: the slot, behind which there are those of remainders and the like,
        # and how much of it is theirs.
        widths = (sum(part[2] for part in parts) // dim for parts in slots.values())
        number = dict(zip(slots, accumulate(widths, initial=0), strict=False))
        place = {key: number[name] for key, name in slot_of.items()}
        self._pooled = [(place[table.key], table.dim) for table in of_all]
        self._projections = [
            (place[table.key], table.dim, _projection(bundle, table).to(dtype))
            for table in tables
            if table.dim < table.vector_dim
        ]
        self._pairs = [(number[t.feature], place[t.key], t.combination) for t in tables if t.is_remainder]
        self._poolings = []
        for name, keys in pooled_features(of_all).items():
            own = slice(place[keys[0].key], place[keys[0].key] + (1 if keys[0].position is None else len(keys)))
            target = number[getattr(keys[0].pooling, "target", None) or name]
            self._poolings.append((number[name], own, target, _pooling(bundle, keys, dtype)))

    def __call__(self, rows: EncodedRows) -> Tensor:
        """The vector of each feature: [B, M, D], of which [:, 0] is zero; as `torchdlrm.model.sparse_arch` has it.

        Raises:
            DatasetError: an id is outside its table.
            BundleError: a block of the tables that these rows need is damaged.
        """
        vectors = self._look_up(rows)
        for slot, dim, weight in self._projections:
            vectors[:, slot] = linear(vectors[:, slot, :dim], weight)
        for slot, remainder, combination in self._pairs:
            combine = torch.Tensor.mul_ if combination == "mult" else torch.Tensor.add_
            combine(vectors[:, slot], vectors[:, remainder])
        for slot, own, target, pool in self._poolings:
            num_values = torch.from_numpy(np.diff(rows.sparse[slot - 1][1]))
            vectors[:, slot] = pool(vectors[:, own], num_values, vectors[:, target])
        # Products of matrices that lie apart are slow: 4,096 rows take half the time where they are moved together.
        return vectors[:, : self._num_slots].contiguous()

    def pooled(self, rows: EncodedRows) -> Tensor:
        """The sums of the rows of each table, [B, sum of their dimensions]; raises as a call."""
        numbers = self._look_up(rows).flatten(1)
        return torch.cat([numbers[:, slot * self._dim :][:, :dim] for slot, dim in self._pooled], dim=1)

    def _look_up(self, rows: EncodedRows) -> Tensor:
        """[B, M + R, D]: the slots, and behind them what the R keys of remainders and the like look up."""
        self._check(rows)
        by_table = rows.of_keys(self._sources)
        ids, offsets = self._flat(by_table)
        weights = by_table.flat_weights()
        vectors: Tensor = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            *self._tables,
            ids,
            offsets,
            PoolingMode.SUM.value,
            None if weights is None else torch.from_numpy(weights),
            _OUTPUT_TYPES[self._dtype].as_int(),
            row_alignment=1,
        )
        return vectors.view(rows.num_rows, -1, self._dim)

    def _flat(self, rows: EncodedRows) -> tuple[Tensor, Tensor]:
        """All ids, table by table, and where each bag of what the kernel sees begins."""
        if not isinstance(rows.sparse, tuple):
            ids_TB = np.ascontiguousarray(rows.sparse)
            if not self._verifier.is_done:
                self._verify(ids_TB)
            flat = ids_TB.reshape(-1) if self._numbers is None else self._numbers(ids_TB)
            ids = torch.from_numpy(flat)
            offsets = self._offsets.get(rows.num_rows)
            if offsets is None or offsets.dtype != ids.dtype:
                if len(self._offsets) > 64:  # batches of many sizes must not fill the memory
                    self._offsets.clear()
                ends = np.cumsum(np.repeat(self._has_ids, rows.num_rows), dtype=flat.dtype)
                offsets = self._offsets[rows.num_rows] = torch.from_numpy(np.pad(ends, (1, 0)))
            return ids, offsets
        values = [ids.astype(np.int64, copy=False) for ids, _ in rows.sparse]
        if not self._verifier.is_done:
            self._verify(values)
        lengths = np.zeros((len(self._has_ids), rows.num_rows), np.int64)
        lengths[self._has_ids] = [np.diff(offsets) for _, offsets in rows.sparse]
        flat = np.concatenate(values) if self._numbers is None else self._numbers(values)
        return torch.from_numpy(flat), torch.from_numpy(np.pad(np.cumsum(lengths), (1, 0)))

    def _check(self, rows: EncodedRows) -> None:
        """The kernel itself would read past the end of a table."""
        if not isinstance(rows.sparse, tuple):
            if not rows.num_rows:
                return
            smallest_F, largest_F = rows.sparse.min(axis=1), rows.sparse.max(axis=1)
        else:
            values = [ids if ids.size else np.zeros(1, np.int64) for ids, _ in rows.sparse]
            smallest_F, largest_F = np.array([ids.min() for ids in values]), np.array([ids.max() for ids in values])
        outside = (smallest_F < 0) | (largest_F >= self._num_rows)
        if outside.any():
            feature = int(np.argmax(outside))
            wrong = smallest_F[feature] if smallest_F[feature] < 0 else largest_F[feature]
            raise DatasetError(
                f"{self._names[feature]}: id {wrong} is outside its table, which has {self._num_rows[feature]:,} rows "
                "(ids from 0)"
            )

    def _verify(self, ids_T: NDArray[np.integer] | list[NDArray[np.int64]]) -> None:
        """Before rows of the file are used first, their blocks are checked; of patched ones those that they replace."""
        num_blocks = self._verifier.num_blocks
        touched = np.zeros(num_blocks, np.bool_)
        for ids, place in zip(ids_T, self._places, strict=True):
            in_file = ids[ids < place.file_rows].astype(np.int64)
            touched |= blocks_of(place.file_start + in_file * place.row_bytes, place.row_bytes, num_blocks)
        self._verifier.require(touched)


def _pooling(bundle: Bundle, keys: Sequence[FeatureTable], dtype: torch.dtype) -> nn.Module:
    """The pooling of a feature with these keys, with the weights of the bundle."""
    module, prefix = pooling_of(keys), f"sparse_arch.poolings.{table_name(keys[0].feature)}."
    for name, value in module.state_dict().items():
        bundle.weights.require(prefix + name, "F32", tuple(value.shape))
    module.load_state_dict({name: bundle.weights.tensor(prefix + name) for name in module.state_dict()})
    return module.to(dtype)


def _projection(bundle: Bundle, table: FeatureTable) -> Tensor:
    """What maps rows of a smaller table to D: [D, dim]."""
    name = projection_weight(table.table_key)
    bundle.weights.require(name, "F32", (table.vector_dim, table.dim))
    return bundle.weights.tensor(name)
