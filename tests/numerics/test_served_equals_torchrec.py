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

SIZES = {"cat_0": 50, "cat_1": 3, "cat_2": 700}


@pytest.mark.parametrize(("tables", "bound"), [("float32", 1e-6), ("int8", 1e-6)])
@pytest.mark.parametrize("batch_rows", [1, 300])
def test_probabilities_equal_torchrecs(tmp_path, seed, tables, bound, batch_rows):
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(batch_rows, 13)).astype(np.float32)
    ids = np.stack([rng.integers(rows, size=batch_rows, dtype=np.int32) for rows in SIZES.values()])
    float32 = Bundle.open(write_random_bundle(tmp_path / "float32", SIZES, "float32"))
    model = torchrec_model(float32)
    if tables == "int8":
        model = quantize_embeddings(model, dtype=torch.qint8, inplace=True)
    features = KeyedJaggedTensor.from_lengths_sync(
        keys=list(SIZES), values=torch.from_numpy(ids).view(-1), lengths=torch.ones(ids.size, dtype=torch.int32)
    )
    with torch.inference_mode():
        expected = torch.sigmoid(model(torch.from_numpy(dense), features)).squeeze(1).numpy()
    bundle = Bundle.open(write_random_bundle(tmp_path / "served", SIZES, tables))
    got = ServedModel(bundle).predict(EncodedRows(dense, ids))
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound)
