"""Takes a step with a model before anything is trained, on a batch such as one of several processes may get.

A slice of a batch may end there with a row of padding: zeros, without ids, left out of the loss.  Its gradient is 0
times what the model's formulas give for it, which is nan where they give infinity.  One process has no padding.
"""

import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchdlrm.features.tables import feature_tables
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.batch_norm import GlobalBatchNorm1d
from torchdlrm.model.build import build_model
from torchdlrm.model.given import GivenEmbeddings

_NUM_ROWS = 3


@dataclass
class _Slice:
    """What `DLRMTrain` needs of a batch."""

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    labels: Tensor
    num_padding: int


class _FirstNan(TorchDispatchMode):
    """Notes the calls that lead to the first operation inside that makes a nan."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        del types
        made = func(*args, **(kwargs or {}))
        # Memory that nothing has been written to yet may look like anything.
        is_written = isinstance(made, Tensor) and made.is_floating_point() and "empty" not in func.__name__
        if is_written and not self.calls and made.isnan().any():
            self.calls = traceback.format_stack()
        return made


class _Trial:
    """A model on the CPU, and random numbers in place of its tables."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape, self._tables = shape, feature_tables(shape.config, shape.features)
        self._train, self._given = build_model(shape, shape.features, torch.device("cpu")), GivenEmbeddings()
        self._train.model.get_submodule("sparse_arch").embedding_bag_collection = self._given
        for module in self._train.modules():
            if isinstance(module, GlobalBatchNorm1d):
                module.eval()  # its statistics are of all processes, which a trial does not ask

    def loss(self, num_padding: int) -> Tensor:
        """The loss of a few rows, of which the last ones are padding."""
        num_rows, keys, dims = _NUM_ROWS - num_padding, [t.key for t in self._tables], [t.dim for t in self._tables]
        lengths = (torch.arange(_NUM_ROWS) < num_rows).int().repeat(len(keys))
        ids = torch.zeros(len(keys) * num_rows, dtype=torch.int64)
        weights = torch.ones(len(ids)) if self._shape.is_weighted else None
        features = KeyedJaggedTensor(keys, ids, weights, lengths=lengths)
        dense, embeddings = torch.rand(_NUM_ROWS, self._shape.num_dense), torch.rand(_NUM_ROWS, sum(dims)) - 0.5
        dense[num_rows:] = embeddings[num_rows:] = 0
        self._given.held[:] = [(features, KeyedTensor(keys, dims, embeddings.requires_grad_()))]
        loss: Tensor = self._train(_Slice(dense, features, torch.ones(_NUM_ROWS), num_padding))[0]
        return loss

    def gradients_are_finite(self, num_padding: int) -> bool:
        """Whether those of all weights are."""
        self._train.zero_grad()
        self.loss(num_padding).backward()
        return all(weight.grad is None or bool(weight.grad.isfinite().all()) for weight in self._train.parameters())

    def calls_of_first_nan(self) -> str:
        """The calls of the forward where padding makes the first nan, as a traceback shows them; "" if nothing does."""
        with warnings.catch_warnings(record=True, action="always") as told, torch.autograd.detect_anomaly():
            with _FirstNan() as first:
                loss = self.loss(num_padding=1)
            with suppress(RuntimeError):  # a nan of the backward; a warning says which calls of the forward it is of
                loss.backward()
        return "".join(first.calls or (str(warning.message) for warning in told))


def take_step(shape: ModelShape) -> None:
    """Take a step, forward and backward, with random weights on a few random rows and one of padding.

    Raises:
        ArithmeticError: padding makes a gradient nan or infinite; its notes have the calls of the forward, if known.
    """
    with torch.random.fork_rng(devices=[]):
        trial = _Trial(shape)
        if trial.gradients_are_finite(num_padding=1) or not trial.gradients_are_finite(num_padding=0):
            return
        error = ArithmeticError(
            "the gradient of a row of padding (dense features and embeddings all zeros) is nan or infinite, and with "
            "several processes batches may end with such a row: add an epsilon where it divides, or takes a root"
        )
        error.add_note(trial.calls_of_first_nan())
    raise error
