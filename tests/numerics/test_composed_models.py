"""Models of one's own that read the embeddings more than once, against the same models in plain torch."""

import pytest
import torch
from torch import nn
from torchrec.models import dlrm as torchrec_dlrm
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchdlrm import DLRM, InteractionArch
from torchdlrm.config import load_config
from torchdlrm.features.tables import features_of_sizes
from torchdlrm.loader.batch import Batch, single_valued_kjt
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.dot import dot_output_size
from torchdlrm.model.model_class import architecture_of
from torchdlrm.training.pipeline import build_pipeline
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.processes.process_group import join_process_group
from torchdlrm.training.sharded import build_optimizer, build_sharded_model

D, NUM_DENSE, NUM_ROWS, STEPS, LEARNING_RATE = 8, 3, 12, 4, 0.5
NUM_EMBEDDINGS = {"cat_1": 7, "cat_2": 5, "cat_3": 9}
SETTINGS = {
    **{f"{part}_optimizer.name": "sgd" for part in ("dense", "table")},
    **{f"{part}_optimizer.learning_rate": str(LEARNING_RATE) for part in ("dense", "table")},
    "model.embedding_dim": str(D),
    "model.dense_arch_layer_sizes": f"16,{D}",
    "model.over_arch_layer_sizes": "16,1",
    "train.batch_size_global": str(NUM_ROWS),
    "train.precision": "float32",
}

pytestmark = pytest.mark.slow


class ProductNet(nn.Module):
    """PNN: what the dots say, and the embeddings themselves."""

    def __init__(self, num_sparse_features, embedding_dim, dots=InteractionArch):
        super().__init__()
        self.dots = dots(num_sparse_features)
        self.output_size = dot_output_size(num_sparse_features, embedding_dim) + num_sparse_features * embedding_dim

    def forward(self, dense_features, sparse_features):
        return torch.cat([self.dots(dense_features, sparse_features), sparse_features.flatten(1)], dim=1)


class TwoInteractions(nn.Module):
    """Dots of the same embeddings with two dense vectors, and the embeddings once more between them."""

    def __init__(self, num_sparse_features, embedding_dim, dots=InteractionArch):
        super().__init__()
        self.dots, self.others = dots(num_sparse_features), dots(num_sparse_features)
        self.output_size = 2 * dot_output_size(num_sparse_features, embedding_dim) + embedding_dim

    def forward(self, dense_features, sparse_features):
        first = self.dots(dense_features, sparse_features)
        second = self.others(1 - 2 * dense_features, sparse_features)
        return torch.cat([first, (sparse_features**2).sum(1), second], dim=1)


class WithWideTerm(DLRM):
    """A DLRM whose logit has a linear term of the embeddings, too."""

    def __init__(self, *args, **arguments):
        super().__init__(*args, **arguments)
        self.wide = nn.Linear(self.sparse_arch.F * self.sparse_arch.D, 1)

    def forward(self, dense_features, sparse_features):
        dense, sparse = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        deep = self.over_arch(self.inter_arch(dense_features=dense, sparse_features=sparse))
        return deep + self.wide(sparse.flatten(1))


KINDS = (ProductNet, TwoInteractions, WithWideTerm)


class PlainTorch(nn.Module):
    """The same models of TorchRec's arches, over tables that are `nn.EmbeddingBag`s."""

    def __init__(self, kind):
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=f"t_{name}", embedding_dim=D, num_embeddings=rows, feature_names=[name])
            for name, rows in NUM_EMBEDDINGS.items()
        ]
        self.sparse_arch = torchrec_dlrm.SparseArch(EmbeddingBagCollection(tables=tables))
        self.dense_arch = torchrec_dlrm.DenseArch(NUM_DENSE, [16, D])
        num_features = len(NUM_EMBEDDINGS)
        is_whole = kind is WithWideTerm
        dots = torchrec_dlrm.InteractionArch
        self.inter_arch = dots(num_features) if is_whole else kind(num_features, D, dots=dots)
        size = dot_output_size(num_features, D) if is_whole else self.inter_arch.output_size
        self.over_arch = torchrec_dlrm.OverArch(size, [16, 1])
        if is_whole:
            self.wide = nn.Linear(num_features * D, 1)

    def forward(self, dense_features, sparse_features):
        dense, sparse = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        deep = self.over_arch(self.inter_arch(dense_features=dense, sparse_features=sparse))
        return deep + self.wide(sparse.flatten(1)) if hasattr(self, "wide") else deep


def batch(step, rows=slice(None)):
    generator = torch.Generator().manual_seed(step)
    ids = [torch.randint(rows, (NUM_ROWS,), generator=generator) for rows in NUM_EMBEDDINGS.values()]
    dense = torch.rand(NUM_ROWS, NUM_DENSE, generator=generator)
    labels = torch.randint(2, (NUM_ROWS,), generator=generator).float()
    kjt = single_valued_kjt([*NUM_EMBEDDINGS], torch.stack(ids)[:, rows].contiguous().numpy())
    return Batch(dense[rows], kjt, labels[rows])


def whole(module, ranks):
    """The weights of all ranks, by their names in the model itself."""
    mine = {}
    for name, value in module.state_dict().items():
        shards = value.local_shards() if hasattr(value, "local_shards") else None
        tensor = value if shards is None else shards[0].tensor if shards else None
        if tensor is not None:
            mine[name.removeprefix("model.")] = tensor.detach().clone()
    return {name: value for of_rank in reversed(ranks.all_gather(mine)) for name, value in of_rank.items()}


def train_all():
    """Of each model its weights before and after the steps on these processes."""
    with join_process_group() as ranks:
        return {kind.__name__: trained(kind, ranks) for kind in KINDS}


def trained(kind, ranks):
    config = load_config(None, SETTINGS)
    shape = ModelShape(
        config.model,
        NUM_DENSE,
        len(NUM_EMBEDDINGS),
        architecture_of(config.model, kind),
        known_features=features_of_sizes(NUM_EMBEDDINGS),
    )
    built = build_sharded_model(config, shape, dense_sample=None, ranks=ranks).module
    pipeline = build_pipeline(built, build_optimizer(built, config.dense_optimizer), dtype=torch.float32, ranks=ranks)
    before = whole(built, ranks)
    share = NUM_ROWS // ranks.world_size
    mine = slice(share * ranks.rank, share * (ranks.rank + 1))
    batches = iter([batch(step, mine) for step in range(STEPS)])
    for _ in range(STEPS):
        pipeline.progress(batches)
    pipeline.detach()
    return before, whole(built, ranks)


@pytest.fixture(scope="module", params=[1, 2])
def found(request):
    return launch(train_all, processes=Processes(request.param))


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_the_same_model_in_plain_torch_learns(kind, found):
    before, after = found[kind.__name__]
    plain = PlainTorch(kind)
    plain.load_state_dict(before)
    optimizer = torch.optim.SGD(plain.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        rows = batch(step)
        logits = plain(rows.dense_features, rows.sparse_features).squeeze(1)
        nn.functional.binary_cross_entropy_with_logits(logits, rows.labels).backward()
        optimizer.step()
    expected = plain.state_dict()
    assert after.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6, msg=name)
        assert not torch.equal(before[name], value), name
