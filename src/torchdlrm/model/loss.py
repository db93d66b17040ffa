"""The loss that a model is trained with, over the rows of a batch that are no padding.

In: a model, and batches on this rank.  Out: the loss, and logits and labels for metrics.

`DLRMTrain` has the embeddings looked up and gives them to the model, whose own code never sees how tables are held.
TorchRec's train pipeline traces `DLRMTrain` by `torch.fx` for what leads to the tables: it comes no further than
`Around`, so a model may be written in any Python, and the loss is a leaf to it (`fx.wrap`).  Where a model is served,
checked or timed (`torchdlrm.model.eager`) other code has looked them up.
Why: docs/decisions/embeddings-are-looked-up-before-the-forward.md.

B rows of the batch on this rank.
"""

import math
from typing import Protocol

from torch import Tensor, fx, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchdlrm.errors import ConfigError
from torchdlrm.model.batch_norm import GlobalBatchNorm1d

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


class TrainingBatch(Protocol):
    """What `DLRMTrain` needs of a batch; `torchrec.datasets.utils.Batch` has it too."""

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    labels: Tensor


def logits_of(output: ModelOutput) -> Tensor:
    """The logits [B] of what a model's forward has given.

    Raises:
        ConfigError: they are not [B, 1].
    """
    logits_B1 = output[0] if isinstance(output, tuple) else output
    if logits_B1.dim() != 2 or logits_B1.shape[1] != 1:
        msg = f"`model_class`: its forward must give logits [rows, 1], got {[*logits_B1.shape]}"
        raise ConfigError(msg)
    return logits_B1.squeeze(1)


def batch_loss(
    logits_B: Tensor,
    labels_B: Tensor,
    batch: TrainingBatch,
    negative_weight: float = 1.0,
    auxiliary_B: Tensor | None = None,
) -> Tensor:
    """Mean binary cross-entropy, so weighted that its mean over ranks is the mean over the global batch.

    An auxiliary loss of each row is added to the row's cross-entropy, and gets the row's weight.

    The ranks may differ by one in their rows of a batch; a batch of ours says by `loss_weight` how much those of this
    rank count. All is without padding.

    With row weights w it is the sum of w times the cross-entropy over the number of rows, and not over the sum of w: so
    a rank needs to know its own rows alone, and a weight scales the gradient of its row whatever the others of the
    batch are. Weights whose mean is 1 leave the size of steps as it was.

    With negatives weighted by w, what minimises the loss has odds of a click 1 / w times too high; He et al. (2014)
    take predictions p back by q = p / (p + (1 - p) / w), which is logit(q) = logit(p) + log(w). Here the loss is taken
    of p, and the model's own logit is that of q: predictions with its weights need no correction.
    """
    if logits_B.numel() == 0:  # every parameter must get a gradient on every rank
        return logits_B.sum() if auxiliary_B is None else logits_B.sum() + auxiliary_B.sum()
    weights_B = None
    if negative_weight != 1.0:
        weights_B = labels_B + (1 - labels_B) * negative_weight
        logits_B = logits_B - math.log(negative_weight)
    row_weights_B: Tensor | None = getattr(batch, "row_weights", None)
    if row_weights_B is not None:
        row_weights_B = without_padding(row_weights_B, batch)
        weights_B = row_weights_B if weights_B is None else weights_B * row_weights_B
    loss = binary_cross_entropy_with_logits(logits_B, labels_B, weights_B)
    if auxiliary_B is not None:
        loss = loss + (auxiliary_B if weights_B is None else auxiliary_B * weights_B).mean()
    return loss * getattr(batch, "loss_weight", 1.0)


def without_padding(values_B: Tensor, batch: TrainingBatch) -> Tensor:
    """What belongs to rows of the dataset: a batch of ours says by `num_padding` how many at its end do not."""
    num_padding: int = getattr(batch, "num_padding", 0)
    return values_B[:-num_padding] if num_padding else values_B


@fx.wrap
def loss_of(output: ModelOutput, batch: TrainingBatch, negative_weight: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of what a model's forward has given, and detached what metrics are made of.

    Returns:
        The loss; and loss, logits, labels, and the row weights where the batch has some.

    Raises:
        ConfigError: logits are not [B, 1], or an auxiliary loss is not [B].
    """
    logits_B = without_padding(logits_of(output), batch)
    labels_B = without_padding(batch.labels.float(), batch)
    auxiliary_B: Tensor | None = None
    if isinstance(output, tuple):
        logits_B1, auxiliary_B = output
        if auxiliary_B.shape != logits_B1.shape[:1]:
            shapes = f"{[*logits_B1.shape]} and {[*auxiliary_B.shape]}"
            msg = f"`model_class`: its forward must give logits [rows, 1] and an auxiliary loss [rows], got {shapes}"
            raise ConfigError(msg)
        auxiliary_B = without_padding(auxiliary_B.float(), batch)
    loss = batch_loss(logits_B, labels_B, batch, negative_weight, auxiliary_B)
    row_weights_B: Tensor | None = getattr(batch, "row_weights", None)
    weights = () if row_weights_B is None else (without_padding(row_weights_B, batch),)
    return loss, (loss.detach(), logits_B.detach(), labels_B.detach(), *weights)


class DLRMTrain(nn.Module):
    """A DLRM with its loss, for TorchRec's train pipelines.

    Padding of a batch counts nowhere: no gradient comes from it, and it is not among the logits and labels. A
    model that holds its tables as `sparse_arch.embedding_bag_collection` is given embeddings that are looked up here.

    Args:
        dlrm_module: the model, a `DLRM` or another one that maps dense features and a KJT to logits [B, 1], or in
            training to these and an auxiliary loss of each row [B].
        negative_weight: weight of rows without a click in the loss; logits are corrected for it.
    """

    def __init__(self, dlrm_module: nn.Module, negative_weight: float = 1.0) -> None:
        super().__init__()
        self.model = dlrm_module
        self.around = Around(dlrm_module)
        self.negative_weight = negative_weight
        if any(isinstance(module, GlobalBatchNorm1d) for module in dlrm_module.modules()):
            self.register_forward_pre_hook(_announce_padding)

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns the loss, and (loss, logits [B], labels [B]) detached; B rows without padding.

        Where rows have weights (`Batch.row_weights`), these [B] are a fourth.
        """
        dense, features = batch.dense_features, batch.sparse_features
        tables = self.around.tables
        output = self.model(dense, features) if tables is None else self.around(dense, features, tables(features))
        return loss_of(output, batch, self.negative_weight)


def _announce_padding(train: nn.Module, arguments: tuple[TrainingBatch]) -> None:
    """Tell the modules that look at more than one row which of the next ones count; unseen by a tracer."""
    for module in train.modules():
        if isinstance(module, GlobalBatchNorm1d):
            module.num_padding = getattr(arguments[0], "num_padding", 0)
