"""A model of your own as a subclass of `torchdlrm.DLRM`: DeepFM (arXiv:1703.04247), with a weight for each id.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/deepfm.py:DeepFM \
        --model.table-init-scale 0.1 --table-optimizer.learning-rate 0.02
    python examples/deepfm.py DATASET RUN

The logit is a sum of three: the over arch of all vectors, the products of all pairs of vectors, and a weight of each
value.  Sums of so many products want small vectors at the start, and small steps.

B rows, F sparse features, D embedding dimension.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm import DLRM, evaluate, load_config, train


class FirstOrder(nn.Module):
    """A weight for each id of each feature, added up by row: 0 for a row of padding, which has no ids."""

    def __init__(self, num_ids: list[int], device: torch.device | None) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(sum(num_ids), device=device))
        first_of_feature = torch.tensor([0, *num_ids[:-1]], device=device).cumsum(0)
        self.register_buffer("first_of_feature", first_of_feature, persistent=False)  # not to be learnt, nor saved

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Map ids, feature by feature, to [B, 1]."""
        num_rows = features.stride()
        cells = torch.repeat_interleave(features.lengths().long())  # of each id: its feature times B, plus its row
        weights = self.weights[features.values().long() + self.first_of_feature[cells // num_rows]]
        return weights.new_zeros(num_rows).index_add(0, cells % num_rows, weights).unsqueeze(1)


class DeepFM(DLRM):
    """Made with the arguments of `DLRM`, which it passes on."""

    def __init__(self, embedding_bag_collection: Any, *, dense_device: torch.device | None, **sizes: Any) -> None:
        super().__init__(embedding_bag_collection, dense_device=dense_device, **sizes)
        num_ids = [table.num_embeddings for table in embedding_bag_collection.embedding_bag_configs()]
        self.first_order = FirstOrder(num_ids, dense_device)

    def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
        """The over arch reads all vectors, as they are."""
        return nn.Identity(), (num_sparse_features + 1) * embedding_dim

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Map a batch to logits [B, 1]."""
        dense, sparse = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        vectors = torch.cat([dense.unsqueeze(1), sparse], dim=1)
        pairs = (vectors.sum(dim=1).square() - vectors.square().sum(dim=1)).sum(dim=1, keepdim=True) / 2
        return self.over_arch(vectors.flatten(1)) + pairs + self.first_order(sparse_features)


if __name__ == "__main__":
    dataset, run = sys.argv[1:]
    settings = {"model.table_init_scale": "0.1", "table_optimizer.learning_rate": "0.02"}
    train(load_config("criteo-small", settings), dataset, run, model_class=DeepFM)
    print(evaluate(run, model_class=DeepFM))
