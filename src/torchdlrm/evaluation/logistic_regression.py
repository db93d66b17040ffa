"""Fits logistic regression on the same encoded rows: what a DLRM must beat to be worth its tables.

Rows count as their weights say. One weight for each id of each feature and one for each dense feature, no interactions.

B rows of a batch, F sparse features.
"""

from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, embedding_bag

from torchdlrm.data.dataset import Dataset
from torchdlrm.loader.batch import Batch
from torchdlrm.loader.loader import Loader
from torchdlrm.metrics import BinaryMetrics, binary_metrics


class LogisticRegression(nn.Module):
    """A model whose logit is a sum of weights.

    Args:
        dataset: says how many ids each feature has.
        dense_sample: encoded dense features, float32 [rows, num_dense], whose mean and deviation scale the input.
    """

    def __init__(self, dataset: Dataset, dense_sample: Tensor) -> None:
        super().__init__()
        num_embeddings = list(dataset.num_embeddings.values())
        self._has_lists = any(column.is_multi_valued for column in dataset.schema.sparse)
        self._first_id_F1 = torch.tensor([0, *np.cumsum(num_embeddings)[:-1]]).unsqueeze(1)
        self._deviation, self._mean = torch.std_mean(dense_sample, dim=0)
        self._deviation.clamp_(min=1e-3)
        self.id_weights = nn.Embedding(sum(num_embeddings), 1)
        self.dense_weights = nn.Linear(len(dataset.dense_names), 1)
        nn.init.zeros_(self.id_weights.weight)
        nn.init.zeros_(self.dense_weights.weight)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits [B]."""
        kjt, num_features = batch.sparse_features, len(self._first_id_F1)
        dense = (batch.dense_features - self._mean) / self._deviation
        if self._has_lists:
            first_ids = self._first_id_F1.flatten().repeat_interleave(torch.tensor(kjt.length_per_key()))
            sums = embedding_bag(
                kjt.values() + first_ids,
                self.id_weights.weight,
                kjt.offsets().long(),
                mode="sum",
                per_sample_weights=kjt.weights_or_none(),
                include_last_offset=True,
            ).view(num_features, -1)
            return sums.sum(dim=0) + self.dense_weights(dense).squeeze(1)
        ids_FB = kjt.values().view(num_features, -1) + self._first_id_F1
        return self.id_weights(ids_FB).sum(dim=(0, 2)) + self.dense_weights(dense).squeeze(1)


def fit_logistic_regression(
    dataset: Dataset, splits: list[str], *, epochs: int = 1, batch_size: int = 1024, learning_rate: float = 0.003
) -> BinaryMetrics:
    """Train on the training split in this process and measure on `splits` together.

    Args:
        dataset: an encoded dataset.
        splits: names of splits.
        epochs: passes over the training split.
        batch_size: rows per step.
        learning_rate: of Adam.

    Raises:
        DatasetError: a split is not there or is empty.
    """
    training = Loader(dataset, "train", batch_size_global=batch_size, epochs=epochs)
    model = LogisticRegression(dataset, torch.from_numpy(training.first_dense_rows()))
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for batch in training:
        loss = binary_cross_entropy_with_logits(model(batch), batch.labels, batch.row_weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    judged = []
    with torch.no_grad():
        for batch in chain.from_iterable(Loader(dataset, split, batch_size_global=8192) for split in splits):
            weights = [] if batch.row_weights is None else [batch.row_weights.numpy()]
            judged.append((batch.labels.numpy(), model(batch).numpy(), *weights))
    return binary_metrics(*map(np.concatenate, zip(*judged, strict=True)))
