r"""An interaction of your own that reads what a user did last, value by value, and not one vector of it.

    python examples/own_sequence.py DATASET RUN

The dataset has a list column, here `history`, whose values share the table of `item`. `pooling = "attention"` has the
values looked up one by one; the interaction gets them as `sequences`, besides the vectors.

B rows, F sparse features, D embedding dimension, P positions, the newest first.
"""

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchdlrm import InteractionArch, evaluate, load_config, train

POOLING = {"pooling": "attention", "target": "item", "attention": "dot"}


class Recurrent(nn.Module):
    """The dots of all pairs, and where a GRU ends that reads the history from its oldest value to its newest."""

    def __init__(self, num_sparse_features: int, embedding_dim: int) -> None:
        super().__init__()
        num_pairs = num_sparse_features * (num_sparse_features + 1) // 2
        self.output_size = 2 * embedding_dim + num_pairs
        self.dots = InteractionArch(num_sparse_features)
        self.reader = nn.GRU(embedding_dim, embedding_dim, batch_first=True)

    def forward(
        self, dense_features: Tensor, sparse_features: Tensor, sequences: Mapping[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Map [B, D], [B, F, D] and of each sequence [B, P, D] and [B, P] to [B, output_size]."""
        vectors, is_value = sequences["history"]
        states, _ = self.reader((vectors * is_value.unsqueeze(2)).flip(1))
        return torch.cat([self.dots(dense_features, sparse_features), states[:, -1]], dim=1)


if __name__ == "__main__":
    dataset, run = sys.argv[1:]
    config = load_config("criteo-small", {f"model.features.history.{key}": value for key, value in POOLING.items()})
    train(config, dataset, run, model_class=Recurrent)
    print(evaluate(run, model_class=Recurrent))
