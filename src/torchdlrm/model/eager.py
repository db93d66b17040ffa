"""Runs a model's own forward over embeddings that other code has looked up, to check and to serve any model.

The collection of tables is replaced by one that gives the embeddings it was handed; all else runs as it was written,
on the same kind of inputs as in training.  The served model falls back to it, a checkpoint's predictions are made by
it, and the planner times it.  A model class is tried so before anything is trained (`take_step`), on a batch such as
one of several processes may get: a slice of a batch may end there with a row of padding, zeros without ids that are
left out of the loss.  Its gradient is 0 times what the model's formulas give for it, which is nan where they give
infinity.  One process has no padding.

B rows of the batch, F sparse features, D embedding dimension.
"""

import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchdlrm.config.model import FeatureConfig
from torchdlrm.model.architecture import ModelShape, Product
from torchdlrm.model.batch_norm import GlobalBatchNorm1d
from torchdlrm.model.build import build_model
from torchdlrm.model.loss import GivenEmbeddings, logits_of
from torchdlrm.model.pooling import Pooling
from torchdlrm.model.sparse_arch import SparseArch

_TRACED_ROWS, _TRIAL_ROWS = 4, 3
_OF_PADDING = (
    "the gradient of a row of padding (dense features and embeddings all zeros) is nan or infinite, and with several "
    "processes batches may end with such a row: add an epsilon where it divides, or takes a root"
)
_OF_ANY_ROW = "the loss or gradient of rows of random numbers is nan or infinite"


class _BFloat16Linear(nn.Linear):
    """A layer whose weights are cast once for autocast, which would do it in each call.

    Where the model's own code switches autocast off, the layer computes in float32 as it did in training.
    """

    cast: tuple[Tensor, Tensor | None]

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, *self.cast) if torch.is_autocast_enabled("cpu") else super().forward(inputs)


class _Float32Linear(nn.Linear):
    """A layer that autocast leaves alone."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(inputs.float())


def _take_the_place_of_tables(model: nn.Module) -> GivenEmbeddings:
    given = GivenEmbeddings()
    model.get_submodule("sparse_arch").embedding_bag_collection = given
    return given


class EagerModel:
    """A model that is given its embeddings, for one thread at a time.

    Args:
        shape: of the model, which is built here with random weights.
        device: where it computes; None: on CPU.

    Attributes:
        module: the model without its tables, evaluating.
        weight_shapes: of its state dict, the tables included.
        tables: of all keys, T of them: F, and more where features have more than one.
    """

    def __init__(self, shape: ModelShape, device: torch.device | None = None) -> None:
        self.module = build_model(shape, device or torch.device("cpu")).model.eval()
        self.weight_shapes = {name: tuple(weight.shape) for name, weight in self.module.state_dict().items()}
        self.tables, self._num_inputs, self._num_labels = shape.tables, shape.num_inputs, shape.num_labels
        self._given = _take_the_place_of_tables(self.module)

    def logits(
        self,
        dense: Tensor,
        ids: Tensor,
        lengths: Tensor,
        pooled: Tensor,
        weights: NDArray[np.float32] | None = None,
    ) -> Tensor:
        """The log-odds of a click of each row: [B]; of L labels [B, L].

        Args:
            dense: float32 [B, num_inputs].
            ids: of all rows, table by table.
            lengths: how many ids each row has: [T * B], table by table.
            pooled: the sums of each table's rows, [B, sum of their dimensions]; or [B, F, D] where all are alike.
            weights: of the ids, where they have some.
        """
        keys, dims = [table.key for table in self.tables], [table.dim for table in self.tables]
        given = None if weights is None else torch.from_numpy(weights)
        features = KeyedJaggedTensor(keys, ids, given, lengths=lengths)
        self._given.held.append((features, KeyedTensor(keys, dims, pooled.flatten(1))))
        try:
            return logits_of(self.module(dense, features), self._num_labels)
        finally:
            self._given.held.clear()

    def prepare_bfloat16(self) -> bool:
        """Make the layers ready for autocast, but for the last ones, which write float32; only on CPU.

        bfloat16 has 8 bits: a logit of -5 is rounded to a multiple of 1/32, its probability by up to 1.6 %, and rows
        that differ get the same.  The last layers are those behind which there is no other on the way to the logit.
        Why: docs/decisions/the-last-layer-writes-float32.md.

        Returns:
            Whether the logit is made of float32 then.  A model that ends with something else than linear layers, as
            with a product of its own, may round it all the same.
        """
        last, _ = self._last_layers()
        for module in self.module.modules():
            if type(module) is not nn.Linear:
                continue
            if module in last:
                module.__class__ = _Float32Linear
            else:
                bias = module.bias
                cast = module.weight.detach().bfloat16(), None if bias is None else bias.detach().bfloat16()
                module.__class__, module.cast = _BFloat16Linear, cast  # type: ignore[assignment]
        return not self._last_layers()[1]

    def _last_layers(self) -> tuple[set[nn.Module], bool]:
        """The linear layers behind which there is no other, and whether a number in bfloat16 comes after them.

        A row of zeros is run by autocast, and followed back from its logit.
        """
        layers: dict[Any, nn.Module] = {}
        hooks = [
            module.register_forward_hook(lambda module, _, output: layers.update({output.grad_fn: module}))
            for module in self.module.modules()
            if isinstance(module, nn.Linear)
        ]
        ones = torch.ones(len(self.tables), dtype=torch.int32)
        dense = torch.zeros(1, self._num_inputs, requires_grad=True)
        pooled = torch.zeros(1, sum(table.dim for table in self.tables), requires_grad=True)
        try:
            with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                logits = self.logits(dense, torch.zeros(len(ones), dtype=torch.int64), ones, pooled)
        finally:
            for hook in hooks:
                hook.remove()
        last, rounds, left, seen = set(), logits.dtype == torch.bfloat16, [logits.grad_fn], {None}
        while left:
            node: Any = left.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in layers:
                last.add(layers[node])
            else:
                rounds |= any(made.dtype == torch.bfloat16 for made in node._input_metadata)
                left += [before for before, _ in node.next_functions]
        return last, rounds


class _Products(TorchDispatchMode):
    """Notes every matrix product that runs inside, of `_TRACED_ROWS` rows."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Product] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        del types
        aten = torch.ops.aten
        first = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1, aten.addbmm: 1}.get(func.overloadpacket)
        if first is not None:
            *batch, rows, inputs = args[first].shape
            outputs = args[first + 1].shape[-1]
            matrices = batch[0] if batch else 1
            # Of one product for the whole batch the right factor is the same for all rows: a weight.
            has_weight = matrices % _TRACED_ROWS != 0
            of_a_row = -(-matrices * rows // _TRACED_ROWS)
            self.found.append(Product(of_a_row, inputs, outputs, has_weight=has_weight))
        return func(*args, **(kwargs or {}))


@cache
def trace_products(shape: ModelShape) -> tuple[Product, ...]:
    """The matrix products that a model computes, found by running it once on a few rows of zeros.

    Those of smaller tables and of poolings are left out: the shape itself counts them.
    """
    alike = {"embedding_dim": None, "quotient_remainder": None}
    features = {name: chosen.model_copy(update=alike) for name, chosen in shape.config.features.items()}
    shape = replace(shape, config=shape.config.with_features(features))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = EagerModel(shape)
        num_tables = len(model.tables)
        arch = model.module.get_submodule("sparse_arch")
        if isinstance(arch, SparseArch):
            arch.poolings.update({name: Pooling(FeatureConfig(), 1, 1) for name in arch.poolings})
        with _Products() as products:
            model.logits(
                torch.zeros(_TRACED_ROWS, shape.num_inputs),
                torch.zeros(_TRACED_ROWS * num_tables, dtype=torch.int64),
                torch.ones(_TRACED_ROWS * num_tables, dtype=torch.int32),
                torch.zeros(_TRACED_ROWS, sum(table.dim for table in model.tables)),
            )
    return tuple(products.found)


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
        self._shape, self._tables = shape, shape.tables
        self._train = build_model(shape, torch.device("cpu"))
        self._given = _take_the_place_of_tables(self._train.model)
        for module in self._train.modules():
            if isinstance(module, GlobalBatchNorm1d):
                module.eval()  # its statistics are of all processes, which a trial does not ask

    def _ids(self, embeddings: Tensor, num_padding: int = 0) -> KeyedJaggedTensor:
        """Ids of as many rows as there are embeddings, which the tables give for them; the last ones are padding."""
        num_rows, keys, dims = len(embeddings), [t.key for t in self._tables], [t.dim for t in self._tables]
        lengths = (torch.arange(num_rows) < num_rows - num_padding).int().repeat(len(keys))
        ids = torch.zeros(int(lengths.sum()), dtype=torch.int64)
        features = KeyedJaggedTensor(keys, ids, torch.ones(len(ids)) if self._shape.is_weighted else None, lengths)
        self._given.held[:] = [(features, KeyedTensor(keys, dims, embeddings))]
        return features

    def _random(self) -> tuple[Tensor, Tensor]:
        width = sum(table.dim for table in self._tables)
        return torch.rand(_TRIAL_ROWS, self._shape.num_inputs), torch.rand(_TRIAL_ROWS, width) - 0.5

    def logits(self) -> list[Tensor]:
        """Those of a few rows in evaluation: together, and of the first alone."""
        (dense, embeddings), model, num_labels = self._random(), self._train.model.eval(), self._shape.num_labels
        with torch.no_grad():
            made = [model(dense[:n], self._ids(embeddings[:n])) for n in (_TRIAL_ROWS, 1)]
        return [logits_of(output, num_labels).float() for output in made]

    def loss(self, num_padding: int) -> Tensor:
        """The loss of a few rows, of which the last ones are padding."""
        dense, embeddings = self._random()
        dense[_TRIAL_ROWS - num_padding :] = embeddings[_TRIAL_ROWS - num_padding :] = 0
        features = self._ids(embeddings.requires_grad_(), num_padding)
        labels = torch.arange(_TRIAL_ROWS).remainder(2).float()[:, None].repeat(1, self._shape.num_labels).squeeze(1)
        return self._train(_Slice(dense, features, labels, num_padding))[0]

    def gradients_are_finite(self, num_padding: int) -> bool:
        """Whether those of all weights are, and the loss."""
        self._train.zero_grad()
        loss = self.loss(num_padding)
        loss.backward()
        gradients = [weight.grad for weight in self._train.parameters() if weight.grad is not None]
        return all(bool(found.isfinite().all()) for found in (loss, *gradients))

    def calls_of_first_nan(self) -> str:
        """The calls of the forward where padding makes the first nan, as a traceback shows them; "" if nothing does."""
        with warnings.catch_warnings(record=True, action="always") as caught, torch.autograd.detect_anomaly():
            with _FirstNan() as first:
                loss = self.loss(num_padding=1)
            with suppress(RuntimeError):  # a nan of the backward; a warning says which calls of the forward it is of
                loss.backward()
        return "".join(first.calls or (str(warning.message) for warning in caught))


def take_step(shape: ModelShape) -> None:
    """Take a step, forward and backward, with random weights on a few random rows and one of padding.

    Raises:
        ArithmeticError: a gradient is nan or infinite; its notes have the calls of the forward, if known. Or in
            evaluation a logit is, or depends on other rows.
    """
    with torch.random.fork_rng(devices=[]):
        trial = _Trial(shape)
        if not trial.gradients_are_finite(num_padding=1):
            error = ArithmeticError(_OF_PADDING if trial.gradients_are_finite(num_padding=0) else _OF_ANY_ROW)
            error.add_note(trial.calls_of_first_nan())
            raise error
        together, alone = trial.logits()
    if not together.isfinite().all() or not torch.allclose(together[:1], alone, rtol=1e-3, atol=1e-3):
        msg = "in evaluation a row's logit must be finite, and depend on no other row: "
        raise ArithmeticError(msg + f"three have {together.tolist()}, the first alone {alone.tolist()}")
