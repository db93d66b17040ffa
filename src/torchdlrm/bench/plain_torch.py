"""A training loop as one writes it by hand without TorchRec: all features share one table, which is a tensor.

In: what the benchmark of the step gives each competitor.  Out: its step, in float32.  Nothing is shared with our model:
linear layers of torch, dot products picked by `index_select`, torch's fused Adagrad, and row-wise Adagrad of the rows
that a batch has looked up, in a dozen operators. Of the ways to write it none was faster with small steps: sparse
gradients that torch coalesces and `unique` took as long, torch's own Adagrad on sparse gradients a third longer.

B rows of the batch, F sparse features, D embedding dimension.
"""

import itertools
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from torchdlrm.bench.competitors import Case, random_batches
from torchdlrm.bench.interleaved import Step
from torchdlrm.config import ModelConfig
from torchdlrm.features.schema import NUM_CRITEO_DENSE
from torchdlrm.training.compute import allow_tf32
from torchdlrm.training.processes.process_group import Ranks


class PlainDLRM(nn.Module):
    """Dense arch, dot products or a cross net, and over arch, around embeddings that are looked up outside."""

    def __init__(self, config: ModelConfig, num_features: int) -> None:
        super().__init__()
        num_vectors, dim = num_features + 1, config.embedding_dim
        self.dense_arch = nn.Sequential(*_layers([NUM_CRITEO_DENSE, *config.dense_arch_layer_sizes]))
        is_dcn = config.interaction == "dcn"
        size = num_vectors * dim if is_dcn else dim + num_vectors * num_features // 2
        self.interaction = CrossNet(config, size) if is_dcn else AllPairs(num_vectors)
        self.over_arch = nn.Sequential(*_layers([size, *config.over_arch_layer_sizes])[:-1])  # ends with a logit

    def forward(self, dense: Tensor, embeddings_BFD: Tensor) -> Tensor:
        """Maps [B, 13] and [B, F, D] to logits [B]."""
        vectors_BND = torch.cat([self.dense_arch(dense).unsqueeze(1), embeddings_BFD], dim=1)
        logits: Tensor = self.over_arch(self.interaction(vectors_BND))
        return logits.squeeze(1)


class AllPairs(nn.Module):
    """The first vector, and the dot products of all pairs."""

    def __init__(self, num_vectors: int) -> None:
        super().__init__()
        first_P, second_P = torch.triu_indices(num_vectors, num_vectors, offset=1)
        self.pairs_P: Tensor
        self.register_buffer("pairs_P", first_P * num_vectors + second_P, persistent=False)

    def forward(self, vectors_BND: Tensor) -> Tensor:
        """Maps [B, N, D] to [B, D + N (N - 1) / 2]."""
        square = torch.bmm(vectors_BND, vectors_BND.transpose(1, 2)).flatten(1)
        return torch.cat([vectors_BND[:, 0], square.index_select(1, self.pairs_P)], dim=1)


class CrossNet(nn.Module):
    """A low-rank cross net, x_0 * (W V x + b) + x in each layer."""

    def __init__(self, config: ModelConfig, size: int) -> None:
        super().__init__()
        rank, layers = config.dcn.low_rank_dim, range(config.dcn.num_layers)
        self.W = nn.ModuleList(nn.Linear(rank, size) for _ in layers)
        self.V = nn.ModuleList(nn.Linear(size, rank, bias=False) for _ in layers)

    def forward(self, vectors_BND: Tensor) -> Tensor:
        """Maps [B, N, D] to [B, N D]."""
        x_0 = x = vectors_BND.flatten(1)
        for W, V in zip(self.W, self.V, strict=True):
            x = torch.addcmul(x, x_0, W(V(x)))
        return x


def _layers(sizes: Sequence[int]) -> list[nn.Module]:
    return [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]


def plain_torch_step(ranks: Ranks, case: Case) -> Step:
    """The step of a plain loop in one process, with Adagrad and row-wise Adagrad, whatever the config says."""
    config = case.config
    allow_tf32(config.train, ranks.device)
    sizes, dim, device = list(case.num_embeddings.values()), config.model.embedding_dim, ranks.device
    lr, eps = config.table_optimizer.learning_rate, config.table_optimizer.eps
    model = PlainDLRM(config.model, len(sizes)).to(device)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=config.dense_optimizer.learning_rate, fused=True)
    table = torch.empty(sum(sizes), dim, device=device).uniform_(-0.01, 0.01)
    squares = torch.zeros(len(table), device=device)
    first_row_F = torch.tensor([0, *accumulate(sizes)][:-1], device=device)
    batches = itertools.cycle(
        [
            tuple(torch.from_numpy(array).to(device) for array in (dense, ids_FB.T.copy(), labels_B))
            for dense, ids_FB, labels_B in random_batches(ranks, case)
        ]
    )

    def step() -> Tensor:
        dense, ids_BF, labels_B = next(batches)
        rows = (ids_BF + first_row_F).flatten()
        embeddings = table.index_select(0, rows).requires_grad_()
        logits_B = model(dense, embeddings.view(-1, len(sizes), dim))
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(logits_B, labels_B)
        loss.backward()
        optimizer.step()
        assert embeddings.grad is not None
        update_rows(table, squares, rows, embeddings.grad, lr=lr, eps=eps)
        return loss.detach()

    return step


def update_rows(table: Tensor, squares: Tensor, rows: Tensor, grad: Tensor, *, lr: float, eps: float) -> None:
    """Row-wise Adagrad of the rows that were looked up; those that occur several times step once.

    Args:
        table: float32 [rows, D].
        squares: of each row the sum of its mean squares so far, float32 [rows].
        rows: that were looked up, int64 [n].
        grad: of each look-up, float32 [n, D].
        lr: learning rate.
        eps: added to the root.
    """
    sorted_rows, order = rows.sort()
    is_first = torch.ones_like(rows)
    is_first[1:] = sorted_rows[1:] != sorted_rows[:-1]
    group = is_first.cumsum_(0).sub_(1)
    # There are n groups, so that a GPU need not say how many have a row; the others add 0 to row 0.
    row_of_group = torch.zeros_like(rows).scatter_(0, group, sorted_rows)
    summed = torch.zeros_like(grad).index_add_(0, group, grad.index_select(0, order))
    squares.index_add_(0, row_of_group, summed.square().mean(1))
    root = squares.index_select(0, row_of_group).sqrt_().add_(eps)
    table.index_add_(0, row_of_group, summed.div_(root.unsqueeze(1)), alpha=-lr)
