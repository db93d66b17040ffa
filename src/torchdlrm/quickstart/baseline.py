"""Fits logistic regression on the same encoded rows: what a DLRM must beat to be worth its tables.

One weight for each id of each feature and one for each dense feature, no interactions. Cells have one id, and all rows
count the same.

B rows of a batch, F sparse features.
"""

from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from torchdlrm.data.dataset import Dataset
from torchdlrm.loader.batch import Batch
from torchdlrm.loader.loader import Loader
from torchdlrm.metrics import BinaryMetrics, binary_metrics

_BATCH_ROWS, _LEARNING_RATE = 1024, 0.003  # of Adam


class _LogisticRegression(nn.Module):
    def __init__(self, dataset: Dataset, dense_sample: Tensor) -> None:
        super().__init__()
        num_embeddings = list(dataset.num_embeddings.values())
        self._first_id_F1 = torch.tensor([0, *np.cumsum(num_embeddings)[:-1]]).unsqueeze(1)
        self._deviation, self._mean = torch.std_mean(dense_sample, dim=0)
        self._deviation.clamp_(min=1e-3)
        self.id_weights = nn.Embedding(sum(num_embeddings), 1)
        self.dense_weights = nn.Linear(len(dataset.dense_names), 1)
        for weights in self.parameters():
            nn.init.zeros_(weights)

    def forward(self, batch: Batch) -> Tensor:
        dense = (batch.dense_features - self._mean) / self._deviation
        ids_FB = batch.sparse_features.values().view(len(self._first_id_F1), -1) + self._first_id_F1
        return self.id_weights(ids_FB).sum(dim=(0, 2)) + self.dense_weights(dense).squeeze(1)


def fit_logistic_regression(dataset: Dataset, splits: list[str]) -> BinaryMetrics:
    """Pass once over the training split, in this process, and judge by `splits` together."""
    training = Loader(dataset, "train", batch_size_global=_BATCH_ROWS)
    model = _LogisticRegression(dataset, torch.from_numpy(training.first_dense_rows()))
    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    for batch in training:
        loss = binary_cross_entropy_with_logits(model(batch), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        batches = chain.from_iterable(Loader(dataset, split, batch_size_global=8192) for split in splits)
        judged = [(batch.labels.numpy(), model(batch).numpy()) for batch in batches]
    return binary_metrics(*map(np.concatenate, zip(*judged, strict=True)))
