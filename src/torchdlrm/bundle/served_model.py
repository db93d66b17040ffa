"""The forward pass as served: encoded rows -> probabilities.

Rows go through in chunks that stay in the processor's caches.  Of a chunk: look the embeddings up, straight in the
precision of the arches; run the dense arch and put its vector beside them; one batched product gives all dot products;
pick each pair once; run the over arch.  docs/benchmarks.md says what each part costs.

B rows, F sparse features, D embedding dimension, N = F + 1 vectors that interact, M slots for them (N, or one more).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.layers import PackedLinear, run_layers
from torchdlrm.bundle.manifest import BundleManifest, DensePrecision
from torchdlrm.bundle.pairs import PairLayout
from torchdlrm.bundle.table_lookup import TableLookup
from torchdlrm.bundle.weights_file import MappedWeights
from torchdlrm.errors import BundleError

__all__ = ["EncodedRows", "ServedModel", "choose_dense_precision"]

_CHUNK_BYTES = 16 * 2**20
_MIN_CHUNK_ROWS, _MAX_CHUNK_ROWS = 256, 8192


def choose_dense_precision(allowed: DensePrecision) -> tuple[DensePrecision, str]:
    """What the arches compute in on this machine, and why.

    Args:
        allowed: by the bundle; bfloat16 without hardware for it would be slower than float32, and less exact.
    """
    if allowed == "float32":
        return "float32", "the bundle says so"
    capabilities = torch.cpu.get_capabilities()
    for name, key in (("AMX", "amx_bf16"), ("AVX512-BF16", "avx512_bf16")):
        if capabilities.get(key):
            return "bfloat16", f"the processor has {name}"
    return "float32", "the processor has neither AVX512-BF16 nor AMX"


class ServedModel:
    """The model of a bundle, for one thread at a time.

    Args:
        bundle: opened.
        dense_precision: what the arches may compute in; None: what the bundle says.

    Attributes:
        dense_precision: what the arches compute in here.
        reason: why, for people.

    Raises:
        BundleError: the weights do not fit the manifest.
    """

    def __init__(self, bundle: Bundle, dense_precision: DensePrecision | None = None) -> None:
        manifest = bundle.manifest
        self.dense_precision, self.reason = choose_dense_precision(dense_precision or manifest.dense_precision)
        self._dtype: torch.dtype = getattr(torch, self.dense_precision)
        self._dim, self._num_dense = manifest.model.embedding_dim, len(bundle.schema.dense)
        dense, over = _layers(bundle.weights, "dense_arch."), _layers(bundle.weights, "over_arch.")
        _check_shapes(bundle, dense, over)
        self._pairs = PairLayout(len(manifest.sparse) + 1, self._dtype)
        self._chunk_rows = _chunk_rows(manifest, self._pairs, self._dtype)
        self._lookup = TableLookup(bundle, self._dtype, self._pairs.num_slots)
        over[0] = (self._pairs.spread(over[0][0], self._dim), over[0][1])
        self._dense_arch = [self._packed(*layer, relu=True) for layer in dense]
        self._over_arch = [self._packed(*layer, relu=layer is not over[-1]) for layer in over]

    def predict(self, encoded: EncodedRows) -> NDArray[np.float32]:
        """The probability of a click of each row.

        Args:
            encoded: B rows.

        Returns:
            float32 [B].

        Raises:
            DatasetError: an id is outside its table.
            BundleError: a block of the weights that is not checked yet is damaged.
        """
        return torch.from_numpy(self.logits(encoded)).sigmoid_().numpy()

    def logits(self, encoded: EncodedRows) -> NDArray[np.float32]:
        """The log-odds of a click of each row: float32 [B]; raises as `predict`."""
        assert encoded.dense.shape[1] == self._num_dense, encoded.dense.shape
        logits_B = torch.empty(encoded.num_rows, dtype=torch.float32)
        with torch.inference_mode():
            num_chunks = -(-encoded.num_rows // self._chunk_rows)
            for chunk in range(num_chunks):  # of equal size: a short one at the end would keep one core waiting
                start, stop = (encoded.num_rows * edge // num_chunks for edge in (chunk, chunk + 1))
                logits_B[start:stop] = self._logits(encoded.part(start, stop))
        return logits_B.numpy()

    def _logits(self, rows: EncodedRows) -> Tensor:
        vectors_BMD = self._lookup(rows)
        # Without dense features the input is a 1, see `torchdlrm.model.dlrm.ConstantArch`.
        dense = np.ascontiguousarray(rows.dense) if self._num_dense else np.ones((rows.num_rows, 1), np.float32)
        dense_BD = run_layers(self._dense_arch, torch.from_numpy(dense).to(self._dtype))
        vectors_BMD[:, 0] = dense_BD
        square_BMM = torch.bmm(vectors_BMD, vectors_BMD.transpose(1, 2))
        interactions = dense_BD.new_empty(rows.num_rows, self._dim + self._pairs.num_columns)
        interactions[:, : self._dim] = dense_BD
        self._pairs.pick(square_BMM, interactions[:, self._dim :])
        return run_layers(self._over_arch, interactions).squeeze(1)

    def _packed(self, weight: Tensor, bias: Tensor, *, relu: bool) -> PackedLinear:
        return PackedLinear(weight, bias, self._dtype, relu=relu, batch_rows=self._chunk_rows)


def _layers(weights: MappedWeights, arch: str) -> list[tuple[Tensor, Tensor]]:
    names = [name for name in weights.shapes if name.startswith(arch) and name.endswith(".weight")]
    return [(weights.tensor(name), weights.tensor(name.removesuffix("weight") + "bias")) for name in names]


def _check_shapes(bundle: Bundle, dense: list[tuple[Tensor, Tensor]], over: list[tuple[Tensor, Tensor]]) -> None:
    model, num_dense = bundle.manifest.model, len(bundle.schema.dense)
    shapes = [(outputs, inputs) for inputs, outputs in model.layer_shapes(num_dense, len(bundle.manifest.sparse))]
    num_layers = len(model.dense_arch_layer_sizes)
    for arch, layers, expected in (("dense", dense, shapes[:num_layers]), ("over", over, shapes[num_layers:])):
        found = [tuple(weight.shape) for weight, _ in layers]
        fit = all(
            weight.dtype == bias.dtype == torch.float32 and bias.shape == weight.shape[:1] for weight, bias in layers
        )
        if found != expected or not fit:
            msg = f"{bundle.path}: the layers of {arch}_arch are {found}, but the model's shape asks for {expected}"
            raise BundleError(msg)


def _chunk_rows(manifest: BundleManifest, pairs: PairLayout, dtype: torch.dtype) -> int:
    """So many rows that what lies between the layers stays in the caches."""
    model = manifest.model
    numbers = pairs.num_slots * (model.embedding_dim + pairs.num_slots) + model.embedding_dim + pairs.num_columns
    numbers += sum(model.dense_arch_layer_sizes) + sum(model.over_arch_layer_sizes)
    return max(_MIN_CHUNK_ROWS, min(_MAX_CHUNK_ROWS, _CHUNK_BYTES // (numbers * dtype.itemsize)))
