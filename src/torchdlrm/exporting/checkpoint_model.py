"""What the checkpoint itself predicts: the eager float32 model, its tables read in place.

This is what a bundle is compared with, and shares no code with the model as served but the reading of rows: TorchRec's
dense and over arch, the interaction of training, float32 throughout.

B rows, F sparse features, D embedding dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchdlrm.bundle.bundle import table_name
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.precision import TablePrecision, as_looked_up
from torchdlrm.config import ModelConfig
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import RunError
from torchdlrm.exporting.checkpoint_reader import CheckpointReader
from torchdlrm.model.build import build_model
from torchdlrm.model.dlrm import DLRM


@dataclass(frozen=True)
class Vectors:
    """The dense vector [B, D] and the pooled embeddings [B, F, D] of B rows, and the model that they go through."""

    model: DLRM
    dense: Tensor
    sparse: Tensor

    def with_feature(self, feature: int, pooled_BD: Tensor) -> "Vectors":
        """The same with other embeddings of one feature."""
        sparse_BFD = self.sparse.clone()
        sparse_BFD[:, feature] = pooled_BD
        return Vectors(self.model, self.dense, sparse_BFD)

    def logits(self) -> NDArray[np.float32]:
        """The log-odds of a click of each row: float32 [B]."""
        with torch.inference_mode():
            interactions = self.model.inter_arch(dense_features=self.dense, sparse_features=self.sparse)
            logits_B: NDArray[np.float32] = self.model.over_arch(interactions).squeeze(1).numpy()
            return logits_B


class CheckpointModel:
    """A checkpoint that predicts.

    Args:
        checkpoint: its weights.
        config: the shape of the model.
        dataset: what it was trained on.

    Raises:
        RunError: its tensors are not those of the model.
    """

    def __init__(self, checkpoint: CheckpointReader, config: ModelConfig, dataset: Dataset) -> None:
        self._checkpoint = checkpoint
        self._tables = [table_name(feature) for feature in dataset.num_embeddings]
        self._model = build_model(
            config,
            num_dense_features=len(dataset.dense_names),
            num_embeddings=dataset.num_embeddings,
            device=torch.device("cpu"),
        ).model.eval()
        expected = {name: tuple(weight.shape) for name, weight in self._model.state_dict().items()}
        if checkpoint.shapes != expected:
            wrong = sorted(dict(checkpoint.shapes.items() ^ expected.items()))
            msg = (
                f"{checkpoint.path}: not a checkpoint of the run's model on this dataset; {', '.join(wrong[:4])} differ"
            )
            raise RunError(msg)
        dense = {name: checkpoint.tensor(name) for name in checkpoint.shapes if name not in self._tables}
        self._model.load_state_dict(dense, strict=False)

    def logits(self, rows: EncodedRows, precisions: Sequence[TablePrecision] | None = None) -> NDArray[np.float32]:
        """The log-odds of a click of each row: float32 [B]; `precisions` as in `vectors`."""
        return self.vectors(rows, precisions).logits()

    def vectors(self, rows: EncodedRows, precisions: Sequence[TablePrecision] | None = None) -> "Vectors":
        """What interacts, before it does.

        Args:
            rows: B rows.
            precisions: that each feature's embeddings are rounded to, F of them; None: none is rounded.
        """
        chosen: Sequence[TablePrecision] = precisions or ["float32"] * len(self._tables)
        sparse = [self.pooled(rows, feature, precision) for feature, precision in enumerate(chosen)]
        with torch.inference_mode():
            dense_BD = self._model.dense_arch(torch.from_numpy(rows.dense))
        return Vectors(self._model, dense_BD, torch.stack(sparse, dim=1))

    def pooled(self, rows: EncodedRows, feature: int, precision: TablePrecision) -> Tensor:
        """The sum of a feature's embeddings: [B, D].

        Args:
            rows: B rows.
            feature: its position in the schema.
            precision: that rows of the table are rounded to before they are added up.
        """
        if not isinstance(rows.sparse, tuple):
            return as_looked_up(self._checkpoint.gather(self._tables[feature], rows.sparse[feature]), precision)
        ids, offsets = rows.sparse[feature]
        found = as_looked_up(self._checkpoint.gather(self._tables[feature], ids), precision)
        bags = torch.repeat_interleave(torch.arange(rows.num_rows), torch.from_numpy(np.diff(offsets)))
        return torch.zeros(rows.num_rows, found.shape[1]).index_add_(0, bags, found)
