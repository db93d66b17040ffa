"""The forward pass as served: encoded rows -> probabilities.

B rows, F sparse features, D embedding dimension, N = F + 1 vectors that interact.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from torchdlrm.export.bundle import Bundle
from torchdlrm.export.encoded_rows import EncodedRows
from torchdlrm.export.table_lookup import TableLookup
from torchdlrm.export.weights_file import MappedWeights

__all__ = ["EncodedRows", "ServedModel"]

_CHUNK_ROWS = 512


class ServedModel:
    """The model of a bundle, for one thread at a time.

    Args:
        bundle: opened.

    Raises:
        BundleError: the weights do not fit the manifest.
    """

    def __init__(self, bundle: Bundle) -> None:
        weights = bundle.weights
        self._lookup = TableLookup(bundle, torch.float32)
        self._dense_arch = [(w, b) for w, b in _layers(weights, "dense_arch.")]
        self._over_arch = [(w, b) for w, b in _layers(weights, "over_arch.")]
        num_vectors = len(bundle.manifest.sparse) + 1
        first_P, second_P = torch.triu_indices(num_vectors, num_vectors, offset=1)
        self._pairs_P = first_P * num_vectors + second_P

    def predict(self, encoded: EncodedRows) -> NDArray[np.float32]:
        """The probability of a click of each row.

        Args:
            encoded: B rows.

        Returns:
            float32 [B].

        Raises:
            DatasetError: an id is outside its table.
            BundleError: a block of the weights that is not checked yet is damaged.
        """
        return torch.from_numpy(self.logits(encoded)).sigmoid_().numpy()

    def logits(self, encoded: EncodedRows) -> NDArray[np.float32]:
        """The log-odds of a click of each row: float32 [B]; raises as `predict`."""
        logits_B = np.empty(encoded.num_rows, np.float32)
        with torch.inference_mode():
            for start in range(0, encoded.num_rows, _CHUNK_ROWS):
                stop = min(start + _CHUNK_ROWS, encoded.num_rows)
                logits_B[start:stop] = self._logits(encoded.part(start, stop)).numpy()
        return logits_B

    def _logits(self, rows: EncodedRows) -> Tensor:
        vectors_BND = self._lookup(rows)
        dense_BD = torch.from_numpy(np.ascontiguousarray(rows.dense))
        for weight, bias in self._dense_arch:
            dense_BD = linear(dense_BD, weight, bias).relu_()
        vectors_BND[:, 0] = dense_BD
        square_BNN = torch.bmm(vectors_BND, vectors_BND.transpose(1, 2))
        hidden = torch.cat([dense_BD, square_BNN.flatten(1).index_select(1, self._pairs_P)], dim=1)
        for weight, bias in self._over_arch[:-1]:
            hidden = linear(hidden, weight, bias).relu_()
        return linear(hidden, *self._over_arch[-1]).squeeze(1)


def _layers(weights: MappedWeights, arch: str) -> list[tuple[Tensor, Tensor]]:
    names = [name for name in weights.shapes if name.startswith(arch) and name.endswith(".weight")]
    return [(weights.tensor(name), weights.tensor(name.removesuffix("weight") + "bias")) for name in names]
