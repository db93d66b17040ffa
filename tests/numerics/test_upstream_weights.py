"""Weights of TorchRec's and of facebookresearch/dlrm's models give the same logits here, and ours there."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.models import dlrm as torchrec_dlrm
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from helpers.interactions import INTERACTIONS
from torchdlrm import evaluate, export, export_as, import_weights
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.config import ModelConfig, load_config
from torchdlrm.data.dataset import rows_of_split
from torchdlrm.errors import BundleError, ConfigError, RunError
from torchdlrm.exporting.checkpoint import CheckpointModel
from torchdlrm.exporting.export import open_checkpoint
from torchdlrm.model.architecture import ModelShape
from torchdlrm.training.job import train
from torchdlrm.training.run import Run

SIZES = {"embedding_dim": 16, "dense_arch_layer_sizes": (24, 16), "over_arch_layer_sizes": (20, 10, 1)}


def torchrecs(dataset, config):
    """TorchRec's own model of a config, with the tables of a dataset."""
    shape = ModelShape.of(config, dataset)
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=config.embedding_dim, num_embeddings=n, feature_names=[name])
        for name, n in dataset.num_embeddings.items()
    ]
    model_class = getattr(torchrec_dlrm, shape.architecture.class_name)
    return with_large_weights(model_class(EmbeddingBagCollection(tables=tables), **shape.arguments))


class PublishedNet(nn.Module):
    """What dlrm_s_pytorch.py computes, stated again: MLPs, sums of embeddings, pairs of the square's lower triangle."""

    def __init__(self, dataset, config):
        super().__init__()
        num_vectors, dim = len(dataset.sparse_names) + 1, config.embedding_dim
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(n, dim, mode="sum") for n in dataset.num_embeddings.values())
        self.bot_l = self._mlp([len(dataset.dense_names), *config.dense_arch_layer_sizes], nn.ReLU())
        num_inputs = dim + num_vectors * (num_vectors - 1) // 2
        self.top_l = self._mlp([num_inputs, *config.over_arch_layer_sizes], nn.Sigmoid())

    @staticmethod
    def _mlp(sizes, last):
        layers = [[nn.Linear(*pair), nn.ReLU()] for pair in itertools.pairwise(sizes)]
        layers[-1][1] = last
        return nn.Sequential(*itertools.chain(*layers))

    def forward(self, dense, offsets, ids):
        """Probabilities [B] of dense [B, num_dense], offsets and ids [F, B]."""
        x = self.bot_l(dense)
        vectors = [x, *(bag(i, o) for bag, i, o in zip(self.emb_l, ids, offsets, strict=True))]
        pairs = [(vectors[i] * vectors[j]).sum(1) for i in range(len(vectors)) for j in range(i)]
        return self.top_l(torch.cat([x, torch.stack(pairs, dim=1)], dim=1)).squeeze(1)


def with_large_weights(model):
    """So that every weight and bias counts in the logits."""
    torch.manual_seed(3)
    for weight in model.parameters():
        nn.init.normal_(weight, std=1.2 / weight.shape[-1] ** 0.5)
    return model


@pytest.fixture(scope="module")
def rows(small_dataset):
    return EncodedRows.from_frame(next(rows_of_split(small_dataset, "train", 1_000)), small_dataset.schema)


@torch.no_grad()
def logits(model, rows, dataset):
    dense, ids = torch.from_numpy(rows.dense), torch.from_numpy(rows.sparse)
    if isinstance(model, PublishedNet):
        last, model.top_l[-1] = model.top_l[-1], nn.Identity()  # a float32 probability near 1 has no exact logit
        found = model(dense, torch.arange(rows.num_rows, dtype=torch.int32).expand(len(ids), -1), ids)
        model.top_l[-1] = last
        return found.numpy()
    lengths = torch.ones(ids.numel(), dtype=torch.int32)
    return model(dense, KeyedJaggedTensor([*dataset.sparse_names], ids.view(-1), lengths=lengths)).squeeze(1).numpy()


def logits_of_run(run, dataset, rows):
    _, checkpoint = open_checkpoint(run, "best")
    return CheckpointModel(checkpoint, run.shape(dataset)).logits(rows)


@pytest.mark.parametrize("interaction", ["dot", "dcn", "projection", "dlrm"])
def test_logits_are_upstreams_and_the_weights_go_back_as_they_came(small_dataset, rows, tmp_path, interaction):
    form = "dlrm" if interaction == "dlrm" else "torchrec"
    config = ModelConfig(**SIZES, **INTERACTIONS["dot" if form == "dlrm" else interaction])
    model = (
        with_large_weights(PublishedNet(small_dataset, config)) if form == "dlrm" else torchrecs(small_dataset, config)
    )
    expected = logits(model, rows, small_dataset)
    assert len(expected) == 1_000
    assert expected.std() > 0.01
    torch.save(
        {"epoch": 3, "state_dict": model.state_dict()} if form == "dlrm" else model.state_dict(), tmp_path / "pt"
    )
    run = import_weights(tmp_path / "pt", small_dataset, tmp_path / "run")
    assert run.config.model == config
    np.testing.assert_allclose(logits_of_run(run, small_dataset, rows), expected, rtol=0, atol=1e-5)

    export_as(tmp_path / "run", tmp_path / "back", form)
    back = torch.load(tmp_path / "back", weights_only=True)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("form", ["torchrec", "dlrm"])
def test_a_trained_run_predicts_the_same_upstream(small_run, small_dataset, rows, tmp_path, form):
    run = Run.open(small_run)
    export_as(small_run, tmp_path / "pt", form)
    model = (PublishedNet if form == "dlrm" else torchrecs)(small_dataset, run.config.model)
    model.load_state_dict(torch.load(tmp_path / "pt", weights_only=True))
    expected = logits_of_run(run, small_dataset, rows)
    np.testing.assert_allclose(logits(model, rows, small_dataset), expected, rtol=0, atol=1e-5)
    back = import_weights(tmp_path / "pt", small_dataset, tmp_path / "back")  # of more than ten tables
    np.testing.assert_allclose(logits_of_run(back, small_dataset, rows), expected, rtol=0, atol=1e-6)
    with pytest.raises(BundleError, match="is there already"):
        export_as(small_run, tmp_path / "pt", form)


def test_a_run_of_imported_weights_is_a_run_like_any_other(small_dataset, rows, tmp_path):
    model = torchrecs(small_dataset, ModelConfig(**SIZES))
    wrapped = {
        f"dlrm.{name}".replace("dense_arch.", "dense_arch._orig_mod."): w.half()
        for name, w in model.state_dict().items()
    }
    config = load_config("criteo-small", {"train.max_steps": "3", "logging.tensorboard": "false"})
    run = import_weights(wrapped, small_dataset, tmp_path / "run", config=config)
    expected = logits(model.half().float(), rows, small_dataset)
    exported = export(run, tmp_path / "bundle", progress=False)
    np.testing.assert_allclose(ServedModel(exported.bundle).logits(rows), expected, rtol=0, atol=1e-5)
    assert evaluate(run, split="test", progress=False)["step"] == 0
    with pytest.raises(RunError, match="has weights already"):
        import_weights(wrapped, small_dataset, tmp_path / "run")
    assert train(run.config, small_dataset, tmp_path / "run", progress=False).summary.resumed_from_step == 0
    later = train(run.config, small_dataset, tmp_path / "later", from_run=tmp_path / "run", progress=False)
    assert later.summary.step == 3


def test_everything_that_does_not_fit_is_named_at_once(small_dataset, tmp_path):
    model = PublishedNet(small_dataset, ModelConfig(**SIZES))
    weights = model.state_dict() | {"emb_l.3.weight": torch.zeros(7, 16), "bot_l.0.weight": torch.zeros(24, 12)}
    weights |= {"v_W_l.0": torch.zeros(3), "top_l.2.bias": torch.full((10,), torch.nan)}
    del weights["emb_l.25.weight"]
    rows = [*small_dataset.num_embeddings.values()]
    with pytest.raises(RunError) as error:
        import_weights(weights, small_dataset, tmp_path / "run")
    for line in (
        f"emb_l.3.weight: is [7, 16], expected [{rows[3]}, 16]",
        f"emb_l.25.weight: is nothing, expected [{rows[25]}, 16]",
        "bot_l.0.weight: is [24, 12], expected [24, 13]",
        "top_l.2.bias: is [10], expected [10] of finite floats",
        "v_W_l.0: is [3], expected nothing",
        f"table sizes {rows[0]},{rows[1]},{rows[2]},7,",
    ):
        assert line in str(error.value)
    assert not (tmp_path / "run").exists()


def test_tables_in_another_order_are_refused(small_dataset, tmp_path):
    weights = torchrecs(small_dataset, ModelConfig(**SIZES)).state_dict()
    tables = {name: weights.pop(name) for name in [*weights] if "embedding_bags" in name}
    with pytest.raises(RunError, match=r"order of the tables: .*t_cat_25.*t_cat_0\.weight"):
        import_weights({**dict(reversed(tables.items())), **weights}, small_dataset, tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (print, "more than tensors"),
        ({"fc.weight": torch.zeros(2, 2)}, "sparse_arch"),
        (None, "No such file"),
        ("folder", "dcp_to_torch_save"),
    ],
)
def test_a_file_without_such_weights_is_refused(small_dataset, tmp_path, content, message):
    if content == "folder":
        (tmp_path / "pt").mkdir()
    elif content is not None:
        torch.save(content, tmp_path / "pt")
    with pytest.raises(RunError, match=message):
        import_weights(tmp_path / "pt", small_dataset, tmp_path / "run")


def test_sizes_that_ours_cannot_have_are_refused(small_dataset, tmp_path):
    config = ModelConfig(**SIZES | {"embedding_dim": 18, "dense_arch_layer_sizes": (24, 18)})
    with pytest.raises(ConfigError, match="multiple of 4"):
        import_weights(PublishedNet(small_dataset, config).state_dict(), small_dataset, tmp_path / "run")


def test_what_upstream_cannot_have_is_refused(interaction_run, tmp_path):
    run = Run.open(interaction_run)
    with pytest.raises(RunError, match=rf"the interaction {run.config.model.interaction}"):
        export_as(interaction_run, tmp_path / "pt", "dlrm")
    if run.config.model.dcn.gated:
        with pytest.raises(RunError, match="a cross net with gates"):
            export_as(interaction_run, tmp_path / "pt", "torchrec")
    assert not (tmp_path / "pt").exists()
