"""Computes the forward pass as served: encoded rows -> probabilities.

Rows go through in chunks that stay in the processor's caches.  Where the architecture has a fast interaction, a chunk
is looked up straight in the precision of the arches, the dense arch puts its vector before the embeddings, the vectors
interact, and the over arch follows; docs/lab/predictions.md says what each part costs.  A model without a fast
interaction runs its own forward over the embeddings that were looked up.

B rows, L labels, F sparse features, D embedding dimension, M slots for vectors (F + 1, or one more), I inputs and O
outputs of a layer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchdlrm.bundle import DensePrecision
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.table_lookup import TableLookup
from torchdlrm.bundle.weights_file import PADDING_NAME
from torchdlrm.data.dataset import Dataset, rows_of_split
from torchdlrm.errors import BundleError
from torchdlrm.features.tables import sources
from torchdlrm.model import table_weight
from torchdlrm.model.architecture import BuiltInArchitecture, ModelShape
from torchdlrm.model.precision import Precision, precision_of_processor
from torchdlrm.model.served import FastInteraction, ServedWeights, run_layers
from torchdlrm.progress import ProgressListener

_CHUNK_BYTES = 16 * 2**20
_MIN_CHUNK_ROWS, _MAX_CHUNK_ROWS = 256, 8192

Forward = Callable[[EncodedRows], Tensor]


class ServedModel:
    """The model of a bundle, for one thread at a time.

    Args:
        bundle: opened, with its model class where it has one.
        dense_precision: what the arches may compute in; None: what the bundle says.

    Attributes:
        precision: what the arches compute in on this machine, and why.
        recalibrations: what logits become, by label; those of labels that are not named stay as they are.

    Raises:
        BundleError: the weights do not fit the manifest, or the bundle was not opened with its model class.
    """

    def __init__(self, bundle: Bundle, dense_precision: DensePrecision | None = None) -> None:
        allowed = dense_precision or bundle.manifest.dense_precision
        self.precision = (
            precision_of_processor() if allowed == "bfloat16" else Precision(torch.float32, "the bundle says so")
        )
        self.recalibrations, self._schema = bundle.manifest.recalibrations, bundle.schema
        self._num_inputs, self._features = bundle.shape.num_inputs, list(bundle.manifest.sparse)
        self._labels = (bundle.shape.num_labels,) * (bundle.shape.num_labels > 1)
        self._chunk_rows = _chunk_rows(bundle, self.precision.dtype)
        weights = ServedWeights(partial(_weight, bundle), self.precision.dtype, self._chunk_rows)
        fast = bundle.shape.architecture.fast_interaction(bundle.shape, weights)
        if fast is None:
            self._forward, self.precision = _eager_forward(bundle, self.precision)
        else:
            self._forward = _fast_forward(bundle, fast, weights)

    @property
    def dense_precision(self) -> DensePrecision:
        """What the arches compute in on this machine."""
        return "bfloat16" if self.precision.dtype == torch.bfloat16 else "float32"

    def predict(self, encoded: EncodedRows) -> NDArray[np.float32]:
        """The probability of a click of each row: float32 [B]; of a model of several labels [B, L].

        Raises:
            DatasetError: an id is outside its table.
            BundleError: a block of the weights that is not checked yet is damaged.
        """
        return torch.from_numpy(self.logits(encoded)).sigmoid_().numpy()

    def logits(self, encoded: EncodedRows) -> NDArray[np.float32]:
        """The log-odds of a click of each row, of the shape of `predict`, which raises the same."""
        assert encoded.dense.shape[1] == self._num_inputs, encoded.dense.shape
        logits = torch.empty(encoded.num_rows, *self._labels, dtype=torch.float32)
        with torch.inference_mode():
            num_chunks = -(-encoded.num_rows // self._chunk_rows)
            for chunk in range(num_chunks):  # of equal size: a short one at the end would keep one core waiting
                start, stop = (encoded.num_rows * edge // num_chunks for edge in (chunk, chunk + 1))
                logits[start:stop] = self._forward(encoded.part(start, stop))
        return self.recalibrated(logits.numpy(), encoded)

    def recalibrated(self, logits: NDArray[np.float32], encoded: EncodedRows) -> NDArray[np.float32]:
        """What the logits of rows become in all that predicts, here and nowhere else: float32, as many as they are."""
        if not self.recalibrations:
            return logits
        of_labels = self._schema.by_label(logits)
        for label, of in self.recalibrations.items():
            ids = None if of.by is None else encoded.ids_of(self._features.index(of.by))
            of_labels[label] = of.apply(of_labels[label], ids)
        return np.stack([*of_labels.values()], axis=1).reshape(logits.shape)


def predict_by_model(
    model: ServedModel, dataset: Dataset, split: str, columns: Sequence[str], progress: ProgressListener, *, phase: str
) -> list[NDArray[Any]]:
    """The logits of all rows of a split, or of several joined by +, and these columns of theirs, in their order.

    Of a model of several labels [N, L], else [N].
    """
    pieces, splits = [], split.split("+")
    progress.start_phase(phase, sum(dataset.splits[name].rows for name in splits))
    for frame in (frame for name in splits for frame in rows_of_split(dataset, name)):
        logits = model.logits(EncodedRows.from_frame(frame, dataset.schema))
        pieces.append([logits, *(frame[name].to_numpy() for name in columns)])
        progress.advance(frame.height)
    return [*map(np.concatenate, zip(*pieces, strict=True))]


def _fast_forward(bundle: Bundle, interaction: FastInteraction, weights: ServedWeights) -> Forward:
    """Dense arch, fast interaction, over arch: weights packed once, and nothing copied that need not be."""
    dtype, config = weights.dtype, bundle.shape.config
    num_dense, lookup = len(bundle.schema.dense), TableLookup(bundle, dtype, interaction.num_slots)
    first_slot = len(bundle.manifest.sparse) + 1
    dense_arch = weights.layers("dense_arch.model", (max(1, num_dense), *config.dense_arch_layer_sizes))
    over_arch = _over_arch(bundle.shape, interaction, weights)
    sizes, projections = [num_dense, *(column.size or 0 for column in bundle.schema.content)], []
    for column, size in zip(bundle.schema.content, sizes[1:], strict=True):
        name, dim = f"content_arch.v_{column.name}", config.embedding_dim
        layer = weights.layer(f"{name}.weight", (dim, size), bias=f"{name}.bias")
        projections.append((layer, weights.get(f"{name}.missing", (dim,)).to(dtype)))

    def forward(rows: EncodedRows) -> Tensor:
        vectors_BMD = lookup(rows)
        # Without dense features the input is a 1, see `torchdlrm.model.dlrm.ConstantArch`.
        given, *content = torch.from_numpy(np.ascontiguousarray(rows.dense)).split(sizes, dim=1)
        dense = given.contiguous() if num_dense else given.new_ones(rows.num_rows, 1)
        for slot, (x, (layer, missing_D)) in enumerate(zip(content, projections, strict=True), first_slot):
            projected = layer(x.to(dtype).contiguous())
            vectors_BMD[:, slot] = torch.where((x == 0).all(dim=1, keepdim=True), missing_D, projected)
        vectors_BMD[:, 0] = run_layers(dense_arch, dense.to(dtype))
        return over_arch(interaction.interact(vectors_BMD))

    return forward


def _over_arch(shape: ModelShape, interaction: FastInteraction, weights: ServedWeights) -> Callable[[Tensor], Tensor]:
    """What makes logits of what the interaction gives: [B], of several labels [B, L] as `torchdlrm.model.heads`."""
    assert isinstance(shape.architecture, BuiltInArchitecture), "others have no fast interaction"
    config, (_, inputs) = shape.config, shape.architecture.interaction(shape)
    spread: Callable[[Tensor], Tensor] | None = interaction.spread

    def tower(name: str) -> Callable[[Tensor], Tensor]:
        hidden = weights.layers(f"{name}.model.0", (inputs, *config.over_arch_layer_sizes[:-1]), spread)
        # In float32 whatever the others compute in: bfloat16 has 8 bits, and a logit rounded to it is a probability in
        # steps of 3 %: docs/decisions/the-last-layer-writes-float32.md.
        last_1I = weights.get(f"{name}.model.1.weight", (1, config.over_arch_layer_sizes[-2])).clone()
        bias_1 = weights.get(f"{name}.model.1.bias", (1,)).clone()
        return lambda inputs_BI: torch.addmv(bias_1, run_layers(hidden, inputs_BI).float(), last_1I[0])

    if shape.num_labels == 1:
        return tower("over_arch")
    from torchdlrm.model.heads import HEADS, logits_of_heads, mixtures  # noqa: PLC0415 - most models have one label

    levels: list[Callable[[list[Tensor]], list[Tensor]]] = []
    for number, level in enumerate(HEADS[config.heads.kind].levels_of(shape.num_labels, config.heads)):
        name, sizes = f"over_arch.levels.{number}", config.heads.expert_layer_sizes
        experts = [
            partial(run_layers, weights.layers(f"{name}.experts.{i}.model", (inputs, *sizes), spread))
            for i in range(len(level.reads))
        ]
        gates = [
            weights.layer(f"{name}.gates.{i}.weight", (len(mixed), inputs), spread=spread)
            for i, (_, mixed) in enumerate(level.gates)
        ]
        levels.append(partial(mixtures, level, experts, gates))
        inputs, spread = sizes[-1], None
    towers = [tower(f"over_arch.towers.{i}") for i in range(shape.num_labels)]
    columns = [lambda below, of=of: of(below).unsqueeze(1) for of in towers]
    return lambda inputs_BI: logits_of_heads(inputs_BI, levels, columns, config.heads.chain(shape.labels))


def _eager_forward(bundle: Bundle, precision: Precision) -> tuple[Forward, Precision]:
    """The model's own forward, in which bfloat16 is autocast as in training; and what it computes in."""
    from torchdlrm.model.eager import EagerModel  # noqa: PLC0415 - with TorchRec, which the fast path can do without

    model = EagerModel(bundle.shape)
    lookup = TableLookup(bundle, torch.float32, len(bundle.manifest.sparse) + 1)
    tables = {table_weight(table.table_key) for table in model.tables}
    of_keys = sources(model.tables, list(bundle.manifest.sparse))
    shapes = {name: shape for name, shape in model.weight_shapes.items() if name not in tables}
    left = bundle.weights.shapes.keys() - model.weight_shapes.keys() - {PADDING_NAME}
    if left:
        raise BundleError(f"{bundle.path}: the model has no {', '.join(sorted(left)[:4])}; is it of another class?")
    model.module.load_state_dict({name: _weight(bundle, name, shape) for name, shape in shapes.items()})

    if precision.dtype == torch.bfloat16 and not model.prepare_bfloat16():
        precision = Precision(torch.float32, "its last layers are no torch.nn.Linear: bfloat16 would round the logit")
    is_bfloat16 = precision.dtype == torch.bfloat16

    def forward(rows: EncodedRows) -> Tensor:
        ids, lengths, weights = rows.of_keys(of_keys).flat()
        dense_BI = torch.from_numpy(np.ascontiguousarray(rows.dense))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bfloat16):
            return model.logits(
                dense_BI, torch.from_numpy(ids), torch.from_numpy(lengths), lookup.pooled(rows), weights
            )

    return forward, precision


def _weight(bundle: Bundle, name: str, shape: tuple[int, ...]) -> Tensor:
    """A float32 weight; raises BundleError where there is none of this shape."""
    bundle.weights.require(name, "F32", shape)
    return bundle.weights.tensor(name)


def _chunk_rows(bundle: Bundle, dtype: torch.dtype) -> int:
    """How many rows at a time: what lies between the layers is to stay in the caches."""
    numbers = bundle.shape.flat_size + sum(product.rows * product.outputs for product in bundle.shape.products)
    return max(_MIN_CHUNK_ROWS, min(_MAX_CHUNK_ROWS, _CHUNK_BYTES // (numbers * dtype.itemsize)))
