"""A bundle predicts what the run predicts that it was made of."""

import numpy as np
import pytest
import torch

from torchdlrm.data.transforms import encode
from torchdlrm.export.bundle import Bundle
from torchdlrm.export.export import open_checkpoint
from torchdlrm.export.served_model import EncodedRows, ServedModel
from torchdlrm.loader.loader import Loader
from torchdlrm.train.checkpoint import Checkpointer
from torchdlrm.train.process_group import join_process_group
from torchdlrm.train.run import Run
from torchdlrm.train.sharded import build_sharded_model


def evaluated(run, dataset, split):
    """Probabilities by the sharded model that `dlrm evaluate` builds, float32 [rows]."""
    run = Run.open(run)
    with join_process_group() as ranks:
        model = build_sharded_model(
            run.config,
            num_embeddings=dataset.num_embeddings,
            num_dense_features=len(dataset.dense_names),
            dense_sample=None,
            ranks=ranks,
        ).module
        checkpointer = Checkpointer(run.checkpoints, model, None, ranks)
        checkpointer.load(open_checkpoint(run, "last")[0])
        checkpointer.close()
        model.eval()
        with torch.no_grad():
            logits = [model(batch)[1][1] for batch in Loader(dataset, split, batch_size_global=500)]
    return torch.cat(logits).sigmoid().numpy()


def encoded_rows(dataset, split):
    import polars as pl

    frame = pl.concat([pl.read_parquet(file.path) for file in dataset.splits[split].files])
    return EncodedRows.from_frame(frame, dataset.schema)


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_float32_bundle_equals_what_evaluate_computes(small_run, small_dataset, small_bundle, split):
    expected = evaluated(small_run, small_dataset, split)
    got = ServedModel(Bundle.open(small_bundle)).predict(encoded_rows(small_dataset, split))
    assert expected.std() > 0.05
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_the_sample_holds_raw_rows_with_their_predictions(small_bundle, small_dataset):
    bundle = Bundle.open(small_bundle)
    raw, expected = bundle.sample()
    assert raw.height == 256
    rows = encode(
        raw, bundle.schema, bundle.dense, {n: small_dataset.vocabulary(n) for n in small_dataset.sparse_names}
    )
    got = ServedModel(bundle).predict(EncodedRows.from_frame(rows, bundle.schema))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.05
