r"""An interaction of your own in thirty lines: it trains, is planned, exported, verified and served like the DLRM's.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/own_interaction.py:FieldAttention \
        --model.settings.num-heads 4
    python examples/own_interaction.py DATASET RUN

B rows, F sparse features, D embedding dimension; together with the dense vector F + 1 vectors interact.
"""

import sys
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchdlrm import evaluate, load_config, train


class FieldAttention(nn.Module):
    """Each vector asks all others, and adds up what they answer: the self-attention of AutoInt (arXiv:1810.11921)."""

    settings: ClassVar = {"num_heads": 2}  # other ones by `model.settings`

    def __init__(self, num_sparse_features: int, embedding_dim: int, num_heads: int) -> None:
        super().__init__()
        self.output_size = (num_sparse_features + 1) * embedding_dim
        self.num_heads = num_heads
        self.project = nn.Linear(embedding_dim, 3 * embedding_dim)

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Map [B, D] and [B, F, D] to [B, output_size]."""
        vectors = torch.cat([dense_features.unsqueeze(1), sparse_features], dim=1)
        # [B, heads, N, D / heads] each
        queries, keys, values = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.project(vectors).chunk(3, dim=2)
        )
        attention = torch.softmax(queries @ keys.transpose(2, 3) / queries.shape[3] ** 0.5, dim=3)
        return (vectors + (attention @ values).transpose(1, 2).flatten(2)).flatten(1)


if __name__ == "__main__":
    dataset, run = sys.argv[1:]
    train(load_config("criteo-small"), dataset, run, model_class=FieldAttention)
    print(evaluate(run, model_class=FieldAttention))
