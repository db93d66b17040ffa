"""Runs a model over embeddings that have been looked up before, so that its own code never sees how tables are held.

In training, `DLRMTrain` has them looked up and gives them to the model: TorchRec's pipeline, which traces by `torch.fx`
what leads to the tables, comes no further than `Around`, and a model may be written in any Python.  Where a model is
served, checked or timed (`torchdlrm.model.eager`) other code has looked them up.
"""

from typing import Any

from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

# What a model's forward gives: logits [B, 1]; or these, and an auxiliary loss of each row [B].
ModelOutput = Tensor | tuple[Tensor, Tensor]


class GivenEmbeddings(nn.Module):
    """Stands where an `EmbeddingBagCollection` stands.

    Attributes:
        features: the batch's ids.
        embeddings: what they look up, which it gives.
    """

    features: KeyedJaggedTensor | None = None
    embeddings: KeyedTensor | None = None

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """The embeddings that were given, once: who gets them may use the memory next to them (`mark_room`).

        Raises:
            ValueError: they are asked for twice, or other ids are.
        """
        if features is not self.features:
            msg = "the tables can be asked once, and for the ids that the model is given: these are looked up before"
            raise ValueError(msg)
        self.features = None
        return self.embeddings


class Around(nn.Module):
    """A model without its tables: their place is taken while it runs. Weights and their names stay the model's.

    Args:
        model: with its tables, sharded or not, as `sparse_arch.embedding_bag_collection`; else it cannot be run so.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple it is no child, whose weights would have two names
        self._given = GivenEmbeddings()

    @property
    def tables(self) -> nn.Module | None:
        """The collection of tables as it is now; None where the model does not hold one so."""
        found: Any = getattr(getattr(self._model[0], "sparse_arch", None), "embedding_bag_collection", None)
        return found

    def forward(self, dense: Tensor, features: KeyedJaggedTensor, embeddings: KeyedTensor) -> ModelOutput:
        """What the model makes of dense features [B, num_dense], ids, and the pooled embeddings of each key."""
        (model,), given, tables = self._model, self._given, self.tables
        sparse_arch: Any = model.get_submodule("sparse_arch")
        given.features, given.embeddings = features, embeddings
        sparse_arch.embedding_bag_collection = given
        try:
            output: ModelOutput = model(dense, features)
            return output
        finally:
            sparse_arch.embedding_bag_collection = tables
            given.features = given.embeddings = None
