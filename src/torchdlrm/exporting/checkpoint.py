"""Predicts from a checkpoint: runs the eager float32 model on its weights, which are read in place.

In: a `CheckpointReader`.  Out: what the checkpoint itself predicts: what a bundle is compared with.

The predictions share no code with the fast path as served but the reading of rows: the model's own forward, float32
throughout.

B rows, F sparse features, D embedding dimension.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchdlrm.bundle import TablePrecision
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.write import as_looked_up
from torchdlrm.errors import RunError
from torchdlrm.features.tables import FeatureTable, sources
from torchdlrm.model import table_weight
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.eager import EagerModel
from torchdlrm.training.checkpoint_reader import CheckpointReader


class CheckpointModel:
    """A checkpoint that predicts, for one thread at a time.

    Attributes:
        tables: of all features, in schema order.

    Raises:
        RunError: its tensors are not those of the model.
    """

    def __init__(self, checkpoint: CheckpointReader, shape: ModelShape) -> None:
        self._checkpoint = checkpoint
        self._model = EagerModel(shape)
        self.tables = self._model.tables
        self._features = [feature.name for feature in shape.features]
        self._sources = sources(self.tables, self._features)
        weights = {table_weight(table.table_key) for table in self.tables}
        if checkpoint.shapes != self._model.weight_shapes:
            wrong = sorted(dict(checkpoint.shapes.items() ^ self._model.weight_shapes.items()))
            raise RunError(
                f"{checkpoint.path}: not a checkpoint of the run's model on this dataset; {', '.join(wrong[:4])} differ"
            )
        dense = {name: checkpoint.tensor(name) for name in checkpoint.shapes if name not in weights}
        self._model.module.load_state_dict(dense)

    def logits(self, rows: EncodedRows, precisions: Sequence[TablePrecision] | None = None) -> NDArray[np.float32]:
        """The log-odds of a click of each row: float32 [B].

        Args:
            rows: B rows.
            precisions: that each feature's embeddings are rounded to, F of them; None: none is rounded.
        """
        return self.logits_of(rows, self.all_pooled(rows, precisions))

    def logits_of(self, rows: EncodedRows, pooled: Tensor) -> NDArray[np.float32]:
        """The log-odds of rows whose embeddings were looked up before: float32 [B]."""
        ids, lengths, weights = rows.of_keys(self._sources).flat()
        with torch.inference_mode():
            logits_B: NDArray[np.float32] = self._model.logits(
                torch.from_numpy(rows.dense), torch.from_numpy(ids), torch.from_numpy(lengths), pooled, weights
            ).numpy()
        return logits_B

    def all_pooled(self, rows: EncodedRows, precisions: Sequence[TablePrecision] | None = None) -> Tensor:
        """The sums of the rows of all tables: [B, sum of their dimensions]; `precisions` as in `logits`."""
        chosen: Sequence[TablePrecision] = precisions or ["float32"] * len(self._features)
        return torch.cat([self.pooled(rows, feature, chosen[feature]) for feature in range(len(chosen))], dim=1)

    def columns(self, feature: int) -> slice:
        """Where those of a feature are."""
        name, starts = self._features[feature], [0, *accumulate(table.dim for table in self.tables)]
        mine = [place for place, table in enumerate(self.tables) if table.feature == name]
        return slice(starts[mine[0]], starts[mine[-1] + 1])

    def pooled(self, rows: EncodedRows, feature: int, precision: TablePrecision) -> Tensor:
        """The sums of the rows of a feature's table, or of its two: [B, sum of their dimensions].

        Args:
            rows: B rows.
            feature: its position in the schema.
            precision: that rows of the table are rounded to before they are added up.
        """
        keys = [(feature, table) for table in self.tables if table.feature == self._features[feature]]
        of_keys = rows.of_keys(keys)
        return torch.cat([self._sums(of_keys, place, keys[place][1], precision) for place in range(len(keys))], dim=1)

    def _sums(self, rows: EncodedRows, place: int, table: FeatureTable, precision: TablePrecision) -> Tensor:
        """The sums of the rows of a table: [B, its dimension]; `place` is that of the key in rows of keys."""
        sparse = rows.sparse[place]
        ids, offsets = sparse if isinstance(sparse, tuple) else (sparse, None)
        found = as_looked_up(self._checkpoint.gather(table_weight(table.table_key), ids), precision)
        if offsets is None:
            return found
        weights = None if rows.weights is None else rows.weights[place]
        if weights is not None:
            found *= torch.from_numpy(weights.copy())[:, None]
        bags = torch.repeat_interleave(torch.arange(rows.num_rows), torch.from_numpy(np.diff(offsets)))
        return torch.zeros(rows.num_rows, found.shape[1]).index_add_(0, bags, found)
