"""Implements the DLRM of arXiv:1906.00091 and its family, with the names and state-dict keys of `torchrec.models.dlrm`.

Weights and code move both ways between the two; ours copies the embeddings less and has a faster interaction.

B rows of the batch on this rank, F sparse features, D embedding dimension, N = F + 1 vectors that interact.
"""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, OverArch
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm.model.dcn import InteractionDCNArch, LowRankCrossNet
from torchdlrm.model.dot import InteractionArch, dot_output_size
from torchdlrm.model.projection import InteractionProjectionArch
from torchdlrm.model.sparse_arch import SparseArch, tables_of

_VECTOR_SCALE = 0.4


class ConstantArch(DenseArch):  # type: ignore[misc]  # TorchRec is untyped
    """The dense arch of a model without dense features: its input is a 1 in every row.

    So the model is TorchRec's DLRM with one dense feature that is always 1, and has the same keys.  What the arch makes
    of the 1 is a learnt vector; its products with the embeddings are what each value says by itself.
    Why: docs/decisions/a-log-without-dense-columns-trains-the-same-model.md.
    """

    def __init__(self, layer_sizes: list[int], device: torch.device | None = None) -> None:
        super().__init__(1, layer_sizes, device=device)

    def forward(self, features: Tensor) -> Tensor:
        """Maps [B, 0] to [B, D], the same vector in each row."""
        return super().forward(features.new_ones(features.shape[0], 1))


class VectorArch(nn.Linear):
    """Maps vectors of content, as of a text or a picture, to D; a learnt vector stands for a missing one, all zeros.

    An output begins with about the scale of an embedding where the numbers of the input have the scale of 1.

    Args:
        size: of a vector.
        embedding_dim: D.
        device: where to create the weights.
    """

    def __init__(self, size: int, embedding_dim: int, device: torch.device | None = None) -> None:
        super().__init__(size, embedding_dim, device=device)
        nn.init.uniform_(self.weight, -_VECTOR_SCALE / size**0.5, _VECTOR_SCALE / size**0.5)
        nn.init.zeros_(self.bias)
        self.missing = nn.Parameter(torch.zeros(embedding_dim, device=device))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Maps [B, size] to [B, D]."""
        return torch.where((input == 0).all(dim=1, keepdim=True), self.missing, super().forward(input))


class DLRM(nn.Module):
    """Dense arch and sparse arch, their interaction, and the over arch that turns it into a logit.

    A subclass that makes another interaction (`make_interaction`) is a model of its own: docs/models.md.

    Args:
        embedding_bag_collection: the tables, all of the same dimension D.
        dense_in_features: number of dense features; without any, the dense arch is a `ConstantArch`.
        dense_arch_layer_sizes: output sizes of the dense arch's layers; the last is D.
        over_arch_layer_sizes: output sizes of the over arch's layers; the last is 1.
        dense_device: where to create everything but the tables.
        content: how many numbers the vectors of each column of content have, which stand behind the dense features.

    Raises:
        ValueError: there are no tables, they differ in dimension, or the dense arch does not end with it.

    Example::

        tables = [EmbeddingBagConfig(name="t1", embedding_dim=8, num_embeddings=100, feature_names=["f1"])]
        model = DLRM(EmbeddingBagCollection(tables=tables), 13, [20, 8], [5, 1])
        model(torch.rand(2, 13), KeyedJaggedTensor(["f1"], torch.tensor([4, 2]), torch.tensor([1, 1]))).shape  # [2, 1]
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
        dense_device: torch.device | None = None,
        content: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        dims = {table.vector_dim for table in tables_of(embedding_bag_collection) if table.asked is None}
        if dims != {dense_arch_layer_sizes[-1]}:
            msg = f"the dense arch ends with {dense_arch_layer_sizes[-1]}, but the tables have dimension {sorted(dims)}"
            raise ValueError(msg)
        self.sparse_arch = SparseArch(embedding_bag_collection, dense_device)
        self.dense_arch = (
            DenseArch(dense_in_features, dense_arch_layer_sizes, device=dense_device)
            if dense_in_features
            else ConstantArch(dense_arch_layer_sizes, device=dense_device)
        )
        self._num_dense, dim = dense_in_features, self.sparse_arch.D
        # With a prefix: a column may be called as an attribute is.
        vectors = {f"v_{name}": VectorArch(size, dim, dense_device) for name, size in (content or {}).items()}
        self.content_arch = nn.ModuleDict(vectors)
        self.inter_arch, over_in_features = self.make_interaction(self.sparse_arch.F + len(vectors), dim)
        if dense_device is not None:
            self.inter_arch.to(dense_device)
        self.over_arch = OverArch(over_in_features, over_arch_layer_sizes, device=dense_device)
        self._cuda_graph_enabled = False
        self._reads_sequences = "sequences" in inspect.signature(self.inter_arch.forward).parameters

    def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
        """The interaction arch, and how many numbers of a row it gives to the over arch.

        Args:
            num_sparse_features: F.
            embedding_dim: D.

        Returns:
            A module whose `forward(dense_features, sparse_features)` maps [B, D] and [B, F, D] to [B, K]; and K.
        """
        return InteractionArch(num_sparse_features), dot_output_size(num_sparse_features, embedding_dim)

    def vectors(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """What interacts: [B, D] of the dense features, and [B, F, D] of the sparse ones, behind them of content."""
        return self._beside_content(dense_features, self.sparse_arch(sparse_features))

    def _beside_content(self, dense_features: Tensor, sparse_BFD: Tensor) -> tuple[Tensor, Tensor]:
        if not self.content_arch:
            return self.dense_arch(dense_features), sparse_BFD
        vectors, begin = [sparse_BFD], self._num_dense
        for arch in self.content_arch.values():
            assert isinstance(arch, VectorArch), "as it was made"
            end = begin + arch.in_features
            vectors.append(arch(dense_features[:, begin:end]).unsqueeze(1))
            begin = end
        return self.dense_arch(dense_features[:, : self._num_dense]), torch.cat(vectors, dim=1)

    def compile_dense_path(self, compile_mode: str = "reduce-overhead") -> None:
        """Let `torch.compile` make of each arch but the sparse one what runs as a CUDA graph; once, on the GPU.

        For loops of one's own: the keys of the state dict then have `_orig_mod` in them, as TorchRec's have. It has
        not been tried on a GPU.

        Args:
            compile_mode: of `torch.compile`.
        """
        for name in () if self._cuda_graph_enabled else ("dense_arch", "inter_arch", "over_arch"):
            setattr(self, name, torch.compile(getattr(self, name), mode=compile_mode))
        self._cuda_graph_enabled = True

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Maps [B, dense_in_features] and a KJT of F keys and stride B to logits [B, 1]."""
        if self._reads_sequences:
            sparse_BFD, sequences = self.sparse_arch.with_sequences(sparse_features)
            vectors, more = self._beside_content(dense_features, sparse_BFD), {"sequences": sequences}
        else:
            vectors, more = self.vectors(dense_features, sparse_features), {}
        return self.over_arch(self.inter_arch(dense_features=vectors[0], sparse_features=vectors[1], **more))


class DLRM_DCN(DLRM):  # noqa: N801 - TorchRec's name
    """A DLRM whose vectors go through a low-rank cross net: DCN v2 (arXiv:2008.13535), as MLPerf has measured it.

    Besides those of `DLRM` it has these arguments.

    Args:
        dcn_num_layers: of the cross net.
        dcn_low_rank_dim: rank of its weights.
        gated: whether each layer of the cross net has a gate; TorchRec's class has none.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
        dcn_num_layers: int,
        dcn_low_rank_dim: int,
        dense_device: torch.device | None = None,
        content: Mapping[str, int] | None = None,
        *,
        gated: bool = False,
    ) -> None:
        # Read by `make_interaction`, which the constructor below calls.
        self.dcn_num_layers, self.dcn_low_rank_dim, self.gated = dcn_num_layers, dcn_low_rank_dim, gated
        super().__init__(
            *(embedding_bag_collection, dense_in_features, dense_arch_layer_sizes, over_arch_layer_sizes, dense_device),
            content,
        )

    def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
        """The cross net over all vectors; see `DLRM.make_interaction`."""
        size = (num_sparse_features + 1) * embedding_dim
        crossnet = LowRankCrossNet(size, self.dcn_num_layers, self.dcn_low_rank_dim, gated=self.gated)
        return InteractionDCNArch(num_sparse_features, crossnet), size


class DLRM_Projection(DLRM):  # noqa: N801 - TorchRec's name
    """A DLRM with products of F1 and F2 vectors, which two branches make of all vectors, in place of all pairs.

    Besides those of `DLRM` it has these arguments.

    Args:
        interaction_branch1_layer_sizes: output sizes of the first branch's layers; the last is F1 D.
        interaction_branch2_layer_sizes: of the second branch's; the last is F2 D.

    Raises:
        ValueError: as `DLRM`; or a branch does not end with a multiple of D.
    """

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
        interaction_branch1_layer_sizes: list[int],
        interaction_branch2_layer_sizes: list[int],
        dense_device: torch.device | None = None,
        content: Mapping[str, int] | None = None,
    ) -> None:
        # Read by `make_interaction`, which the constructor below calls.
        self.branch_layer_sizes = interaction_branch1_layer_sizes, interaction_branch2_layer_sizes
        super().__init__(
            *(embedding_bag_collection, dense_in_features, dense_arch_layer_sizes, over_arch_layer_sizes, dense_device),
            content,
        )

    def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
        """The two branches and their products; see `DLRM.make_interaction`."""
        for number, sizes in enumerate(self.branch_layer_sizes, start=1):
            if sizes[-1] % embedding_dim:
                msg = f"interaction branch {number} ends with {sizes[-1]}, which is no multiple of D = {embedding_dim}"
                raise ValueError(msg)
        first, second = (DenseArch((num_sparse_features + 1) * embedding_dim, s) for s in self.branch_layer_sizes)
        num_first, num_second = (sizes[-1] // embedding_dim for sizes in self.branch_layer_sizes)
        return InteractionProjectionArch(num_sparse_features, first, second), embedding_dim + num_first * num_second
