"""The loss that a model is trained with, over the rows of a batch that are no padding.

In: a model, and batches on this rank.  Out: the loss, and logits and labels for metrics.

`DLRMTrain` has the embeddings looked up and gives them to the model, whose own code never sees how tables are held.
TorchRec's train pipeline traces `DLRMTrain` by `torch.fx` for what leads to the tables: it comes no further than
`Around`, so a model may be written in any Python, and no further than `BatchLoss`.  Where a model is served,
checked or timed (`torchdlrm.model.eager`) other code has looked them up.
Why: docs/decisions/embeddings-are-looked-up-before-the-forward.md.

B rows of the batch on this rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchdlrm.errors import ConfigError
from torchdlrm.model.model_class import shape_of

# What a model's forward gives: logits [B, L]; or these, and an auxiliary loss of each row [B], or what its loss reads.
ModelOutput = Tensor | tuple[Tensor, Tensor]
LossWeights = Mapping[str, float] | Literal["uncertainty"] | None
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
            return model(dense, features)
        finally:
            given.held.clear()
            modules[_TABLES] = tables


class TrainingBatch(Protocol):
    """What `DLRMTrain` needs of a batch; `torchrec.datasets.utils.Batch` has it too."""

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    labels: Tensor


def logits_of(output: ModelOutput, num_labels: int = 1) -> Tensor:
    """The logits [B] of what a model's forward has given, of several labels [B, L].

    Raises:
        ConfigError: they are not [B, L].
    """
    logits_BL: Any = output[0] if isinstance(output, tuple) else output
    if not isinstance(logits_BL, Tensor) or logits_BL.dim() != 2 or logits_BL.shape[1] != num_labels:
        raise ConfigError(f"`model_class`: forward must give logits [rows, {num_labels}], got {shape_of(logits_BL)}")
    return logits_BL if num_labels > 1 else logits_BL.squeeze(1)


def batch_loss(
    logits_B: Tensor,
    labels_B: Tensor,
    batch: TrainingBatch,
    negative_weight: float = 1.0,
    auxiliary_B: Tensor | None = None,
    of_labels: nn.Module | None = None,
) -> Tensor:
    """Mean binary cross-entropy, so weighted that its mean over ranks is the mean over the global batch.

    An auxiliary loss of each row is added to the row's cross-entropy, and gets the row's weight. Of several labels
    logits and labels are [B, L], each is treated alike, and `of_labels` makes one loss of theirs.

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
        nothing = logits_B.sum() if auxiliary_B is None else logits_B.sum() + auxiliary_B.sum()
        return nothing if of_labels is None else nothing + 0 * of_labels(logits_B.sum(0))
    weights_B = None
    if negative_weight != 1.0:
        weights_B = labels_B + (1 - labels_B) * negative_weight
        logits_B = logits_B - math.log(negative_weight)
    row_weights_B: Tensor | None = getattr(batch, "row_weights", None)
    if row_weights_B is not None:
        row_weights_B = without_padding(row_weights_B, batch)
        by_row = row_weights_B if of_labels is None else row_weights_B[:, None]
        weights_B = by_row if weights_B is None else weights_B * by_row
    if of_labels is None:
        loss = binary_cross_entropy_with_logits(logits_B, labels_B, weights_B)
    else:
        losses = binary_cross_entropy_with_logits(logits_B.float(), labels_B, weights_B, reduction="none")
        loss, weights_B = of_labels(losses.mean(0)), row_weights_B
    if auxiliary_B is not None:
        loss = loss + (auxiliary_B if weights_B is None else auxiliary_B * weights_B).mean()
    return loss * getattr(batch, "loss_weight", 1.0)


def without_padding(values_B: Tensor, batch: TrainingBatch) -> Tensor:
    """What belongs to rows of the dataset: a batch of ours says by `num_padding` how many at its end do not."""
    num_padding: int = getattr(batch, "num_padding", 0)
    return values_B[:-num_padding] if num_padding else values_B


class WeightedSum(nn.Module):
    """The loss of several labels: the sum of their cross-entropies, each times a number of its own, 1 if not given."""

    def __init__(self, labels: Sequence[str], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor([weights.get(name, 1.0) for name in labels]), persistent=False)

    def forward(self, losses_L: Tensor) -> Tensor:
        """Maps cross-entropies [L] to []."""
        return (losses_L * self.weights).sum()


class ByUncertainty(nn.Module):
    """The sum over labels t of exp(-s_t) L_t + s_t, where s_t is learnt (Kendall et al., arXiv:1705.07115)."""

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(len(labels)))

    def forward(self, losses_L: Tensor) -> Tensor:
        """Maps cross-entropies [L] to []."""
        return (losses_L * torch.exp(-self.log_variances) + self.log_variances).sum()


class BatchLoss(nn.Module):
    """The loss of what a model's forward has given; to TorchRec's tracer it is a leaf.

    In training it is the model's own where its class has a method `loss`; else, and in validations, cross-entropy. The
    arguments are those of `DLRMTrain`; with a loss of its own, weights that it does not read are a ConfigError.
    """

    def __init__(
        self, model: nn.Module, negative_weight: float, labels: Sequence[str], weights: LossWeights = None
    ) -> None:
        super().__init__()
        self._negative_weight, self._num_labels = negative_weight, max(1, len(labels))
        method = getattr(type(model), "loss", None)
        self._own = None if method is None else (model, method)  # in a tuple the model is no child
        if self._own and (weights or (negative_weight != 1.0 and self._num_labels > 1)):
            key = "loss_weights" if weights else "negative_weight"
            msg = f"train.{key}: {type(model).__name__} has a `loss` of its own, which does not read it; leave it out"
            raise ConfigError(msg)
        of_labels = ByUncertainty(labels) if weights == "uncertainty" else WeightedSum(labels, weights or {})
        self.of_labels = of_labels if self._num_labels > 1 else None

    def forward(self, output: ModelOutput, batch: TrainingBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and detached what metrics are made of.

        Returns:
            The loss; and loss, logits, labels, and the row weights where the batch has some.

        Raises:
            ConfigError: logits are not [B, L], or an auxiliary loss, or the model's own, is not [B].
        """
        logits = without_padding(logits_of(output, self._num_labels), batch)
        labels = without_padding(batch.labels.float(), batch)
        row_weights_B: Tensor | None = getattr(batch, "row_weights", None)
        weights = () if row_weights_B is None else (without_padding(row_weights_B, batch),)
        if self._own is not None and self.training:
            weights_B = weights[0] if weights else labels.new_ones(len(labels))
            if self._negative_weight != 1.0:
                weights_B = weights_B * (labels + (1 - labels) * self._negative_weight)
            losses_B = self._own_losses(output, labels, weights_B, batch) * weights_B
            mean = losses_B.mean() if len(losses_B) else losses_B.sum()  # not nan, and with a gradient
            loss = mean * getattr(batch, "loss_weight", 1.0)
        else:
            auxiliary_B = _auxiliary(output, batch) if isinstance(output, tuple) else None
            loss = batch_loss(logits, labels, batch, self._negative_weight, auxiliary_B, self.of_labels)
        return loss, (loss.detach(), logits.detach(), labels.detach(), *weights)

    def _own_losses(self, output: Any, labels: Tensor, weights_B: Tensor, batch: TrainingBatch) -> Tensor:
        parts = [without_padding(part, batch) for part in (output if isinstance(output, tuple) else [output])]
        assert self._own is not None, "asked before"
        if self._negative_weight != 1.0:
            parts[0] = parts[0] - math.log(self._negative_weight)  # why: `batch_loss`
            if len(parts) > 1:
                msg = "train.negative_weight: corrects logits alone, and the `loss` is given more; leave it out"
                raise ConfigError(msg)
        outputs, (model, method) = tuple(parts) if isinstance(output, tuple) else parts[0], self._own
        losses_B: Any = method(model, outputs, labels, weights_B)
        if not isinstance(losses_B, Tensor) or losses_B.shape != weights_B.shape:
            raise ConfigError(f"`model_class`: `loss` must give a number of each row [rows], got {shape_of(losses_B)}")
        return losses_B


def _auxiliary(output: tuple[Tensor, Tensor], batch: TrainingBatch) -> Tensor:
    logits, *others = output
    if [shape_of(other) for other in others] != [[len(logits)]]:
        msg = f"`model_class`: its forward must give logits [rows, {logits.shape[1]}] and an auxiliary loss [rows], "
        raise ConfigError(msg + f"got {' and '.join(str(shape_of(part)) for part in output)}")
    return without_padding(others[0].float(), batch)


class DLRMTrain(nn.Module):
    """A DLRM with its loss, for TorchRec's train pipelines.

    Padding of a batch counts nowhere: no gradient comes from it, and it is not among the logits and labels. A
    model that holds its tables as `sparse_arch.embedding_bag_collection` is given embeddings that are looked up here.

    Args:
        dlrm_module: the model, a `DLRM` or another one that maps dense features and a KJT to logits [B, L], or in
            training to these and an auxiliary loss of each row [B], or what a loss of its own reads.
        negative_weight: weight of rows without a click in the loss; logits are corrected for it.
        labels: names of the L labels, in the order of the logits; one where there are none.
        loss_weights: of several labels, as `train.loss_weights`.
    """

    def __init__(
        self,
        dlrm_module: nn.Module,
        negative_weight: float = 1.0,
        labels: Sequence[str] = (),
        loss_weights: LossWeights = None,
    ) -> None:
        super().__init__()
        self.model = dlrm_module
        self.around = Around(dlrm_module)
        self.loss = BatchLoss(dlrm_module, negative_weight, labels, loss_weights)
        if any(hasattr(module, "num_padding") for module in dlrm_module.modules()):
            self.register_forward_pre_hook(_announce_padding)

    def forward(self, batch: TrainingBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns the loss, and (loss, logits [B], labels [B]) detached, of L labels [B, L]; B rows without padding.

        Where rows have weights (`Batch.row_weights`), these [B] are a fourth.
        """
        dense, features = batch.dense_features, batch.sparse_features
        tables = self.around.tables
        output = self.model(dense, features) if tables is None else self.around(dense, features, tables(features))
        return self.loss(output, batch)


def _announce_padding(train: nn.Module, arguments: tuple[TrainingBatch]) -> None:
    """Tell the modules that look at more than one row which of the next ones count; unseen by a tracer."""
    for module in train.modules():
        if hasattr(module, "num_padding"):
            vars(module)["num_padding"] = getattr(arguments[0], "num_padding", 0)
