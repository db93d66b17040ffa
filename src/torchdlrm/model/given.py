"""Runs a model over embeddings that have been looked up before, so that its own code never sees how tables are held.

In training, `DLRMTrain` has them looked up and gives them to the model: TorchRec's pipeline, which traces by `torch.fx`
what leads to the tables, comes no further than `Around`, and a model may be written in any Python.  Where a model is
served, checked or timed (`torchdlrm.model.eager`) other code has looked them up.
Why: docs/decisions/embeddings-are-looked-up-before-the-forward.md.
"""

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

# What a model's forward gives: logits [B, 1]; or these, and an auxiliary loss of each row [B].
ModelOutput = Tensor | tuple[Tensor, Tensor]
_TABLES = "embedding_bag_collection"


class GivenEmbeddings(nn.Module):
    """Stands where an `EmbeddingBagCollection` stands.

    Attributes:
        held: the batch's ids and what they look up, while the model runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: list[tuple[KeyedJaggedTensor, KeyedTensor]] = []

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """The embeddings that were given.

        Raises:
            ValueError: those of other ids are asked for.
        """
        if not self.held or features is not self.held[0][0]:
            msg = "tables give the embeddings of the ids that the model is given, which are looked up before it runs"
            raise ValueError(msg)
        return self.held[0][1]


class Around(nn.Module):
    """A model without its tables: their place is taken while it runs. Weights and their names stay the model's.

    Args:
        model: with its tables, sharded or not, as `sparse_arch.embedding_bag_collection`; else it cannot be run so.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        arch = getattr(model, "sparse_arch", None)
        # In a tuple it is no child, whose weights would have two names. To set an attribute of a module takes long.
        self._held = model, arch._modules if isinstance(arch, nn.Module) else {}, GivenEmbeddings()

    @property
    def tables(self) -> nn.Module | None:
        """The collection of tables as it is now; None where the model does not hold one so."""
        return self._held[1].get(_TABLES)

    def forward(self, dense: Tensor, features: KeyedJaggedTensor, embeddings: KeyedTensor) -> ModelOutput:
        """What the model makes of dense features [B, num_dense], ids, and the pooled embeddings of each key."""
        model, modules, given = self._held
        tables = modules[_TABLES]
        modules[_TABLES] = given
        given.held.append((features, embeddings))
        try:
            output: ModelOutput = model(dense, features)
            return output
        finally:
            given.held.clear()
            modules[_TABLES] = tables
