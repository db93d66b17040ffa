"""The served model computes what TorchRec's own modules compute, eager and quantised, with the same weights."""

import numpy as np
import pytest
import torch
from torchrec.inference.modules import quantize_embeddings
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm.bench.predict import torchrec_model
from torchdlrm.bench.random_bundle import write_random_bundle
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.config import ModelConfig
from torchdlrm.errors import BundleError

SIZES = {"cat_0": 50, "cat_1": 3, "cat_2": 700}
DCN = ModelConfig(interaction="dcn", dcn={"num_layers": 2, "low_rank_dim": 40})
MODELS = {
    "dot": ModelConfig(),
    "dcn": DCN,
    "projection": ModelConfig(
        interaction="projection", projection={"branch1_layer_sizes": (64, 256), "branch2_layer_sizes": (384,)}
    ),
}
GATED = ModelConfig(interaction="dcn", dcn={"num_layers": 2, "low_rank_dim": 40, "gated": True})


def random_rows(seed, num_rows):
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(num_rows, 13)).astype(np.float32)
    return dense, np.stack([rng.integers(rows, size=num_rows, dtype=np.int32) for rows in SIZES.values()])


@pytest.mark.parametrize("interaction", MODELS)
@pytest.mark.parametrize("tables", ["float32", "int8"])
def test_probabilities_equal_torchrecs(tmp_path, seed, interaction, tables):
    config = MODELS[interaction]
    float32 = Bundle.open(write_random_bundle(tmp_path / "float32", SIZES, "float32", config))
    model = torchrec_model(float32)
    if tables == "int8":
        model = quantize_embeddings(model, dtype=torch.qint8, inplace=True)
    served = ServedModel(Bundle.open(write_random_bundle(tmp_path / "served", SIZES, tables, config)))
    for batch_rows in (1, 300):
        dense, ids = random_rows(seed, batch_rows)
        features = KeyedJaggedTensor.from_lengths_sync(
            keys=list(SIZES), values=torch.from_numpy(ids).view(-1), lengths=torch.ones(ids.size, dtype=torch.int32)
        )
        with torch.inference_mode():
            expected = torch.sigmoid(model(torch.from_numpy(dense), features)).squeeze(1).numpy()
        np.testing.assert_allclose(served.predict(EncodedRows(dense, ids)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-6), ("bfloat16", 5e-5)])
@pytest.mark.parametrize("config", [*MODELS.values(), GATED], ids=[*MODELS, "gated"])
def test_the_fast_path_is_the_models_own_forward(tmp_path, seed, config, precision, bound, monkeypatch):
    bundle = Bundle.open(write_random_bundle(tmp_path / "bundle", SIZES, "float32", config))
    rows = EncodedRows(*random_rows(seed, 300))
    fast = ServedModel(bundle, precision)
    monkeypatch.setattr(type(bundle.shape.architecture), "fast_interaction", lambda *_: None)
    eager = ServedModel(bundle, precision)
    assert "eager" in eager._forward.__qualname__
    assert "fast" in fast._forward.__qualname__
    expected = eager.predict(rows)
    assert expected.std() > 5 * bound
    np.testing.assert_allclose(fast.predict(rows), expected, rtol=0, atol=bound)


def test_a_cross_net_of_another_shape_is_refused(tmp_path):
    bundle = Bundle.open(write_random_bundle(tmp_path / "bundle", SIZES, "float32", DCN))
    changed = ModelConfig(interaction="dcn", dcn={"num_layers": 2, "low_rank_dim": 41})
    bundle.manifest = bundle.manifest.model_copy(update={"model": changed})
    with pytest.raises(BundleError, match=r"crossnet.V_kernels.0 is \('F32', \(40, 512\)\), expected .*\(41, 512\)"):
        ServedModel(bundle)
