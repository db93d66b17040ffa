"""Two processes of one host that exchange through memory train and predict, bit for bit, as they do through sockets."""

import itertools
import random
import time
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm.config import load_config
from torchdlrm.features.tables import features_of_sizes
from torchdlrm.loader.batch import Batch
from torchdlrm.model.architecture import ModelShape
from torchdlrm.tables import one_host
from torchdlrm.tables.collection import TablesOfRank
from torchdlrm.training import gradients_on_one_host, sharded
from torchdlrm.training import pipeline as pipelines
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.processes.process_group import join_process_group
from torchdlrm.training.sharded import build_optimizer, build_sharded_model

D = 8
SETTINGS = {
    "model.embedding_dim": str(D),
    "model.dense_arch_layer_sizes": f"16,{D}",
    "model.over_arch_layer_sizes": "16,1",
    "train.batch_size_global": "16",
}
# By name: tables, how the dense parts compute, further settings.
CASES = {
    "float32": (5, torch.float32, {}),
    "bfloat16": (5, torch.bfloat16, {}),
    "weighted": (5, torch.float32, {}),
    "a rank without tables": (1, torch.float32, {}),
    "rounded": (5, torch.float32, {"train.communication": "float16"}),
    "cut": (5, torch.float32, {"sharding.constraints": '["cat_1=row_wise"]'}),
}
IN_MEMORY = ["float32", "bfloat16", "weighted", "a rank without tables"]

pytestmark = pytest.mark.slow


def batch(names, num_rows, generator, *, is_weighted):
    """Rows with none to three ids in a cell."""
    lengths = torch.randint(0, 4, (len(names) * num_rows,), generator=generator)
    ids = torch.randint(0, 20, (int(lengths.sum()),), generator=generator)
    labels = torch.randint(0, 2, (num_rows,), generator=generator).float()
    weights = torch.randn(len(ids), generator=generator) if is_weighted else None
    kjt = KeyedJaggedTensor(names, ids, weights, lengths=lengths)
    return Batch(torch.rand(num_rows, 13, generator=generator), kjt, labels)


def unpunctual(method, seed=0):
    """Before and after the method one of the two ranks sleeps: without a barrier the other one would overtake it."""
    sleepers = random.Random(seed)  # the same on both ranks
    rank = torch.distributed.get_rank()

    def with_pauses(*args):
        for do in (lambda: None, lambda: method(*args)):
            result = do()
            if sleepers.randrange(2) == rank:
                time.sleep(0.02)
        return result

    return with_pauses


def built(ranks, case):
    """Model, its pipeline, its collection of tables, the names of the tables."""
    num_tables, dtype, settings = CASES[case]
    num_embeddings = {f"cat_{i}": 20 + i for i in range(num_tables)}
    config = load_config(None, SETTINGS | settings)
    model = build_sharded_model(
        config,
        ModelShape(
            config.model,
            13,
            num_tables,
            is_weighted=case == "weighted",
            known_features=features_of_sizes(num_embeddings),
        ),
        dense_sample=None,
        ranks=ranks,
    ).module
    optimizer = build_optimizer(model, config.dense_optimizer)
    pipeline = pipelines.build_pipeline(model, optimizer, dtype=dtype, ranks=ranks)
    (tables,) = (module for module in model.modules() if isinstance(module, ShardedEmbeddingBagCollection))
    return model, pipeline, tables, list(num_embeddings)


def trained(model, pipeline, tables, names):
    """What came of some steps, some predictions, and some steps more."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    make = partial(batch, names, is_weighted=tables._is_weighted)
    found = []
    # Ids of the next batch are under way when the memory grows; longer batches follow shorter ones, as in each epoch.
    for sizes in ([8, 8, 8, 30, *[5, 12] * 6], [5, 8, 5]):
        batches = iter([make(num_rows, generator) for num_rows in sizes])
        found += itertools.chain.from_iterable(pipeline.progress(batches) for _ in sizes)
        with torch.no_grad():
            pipeline.detach().eval()
            found += [model(make(num_rows, generator))[1][1] for num_rows in (8, 40, 8)]
            contexts = [tables.create_context() for _ in range(4)]
            ids = [tables.input_dist(ctx, make(8, generator).sparse_features).wait() for ctx in contexts]
            # Whose ids are here already waits for nobody when it looks up.
            for context, awaited in zip(contexts, [each.wait() for each in ids], strict=True):
                pooled = tables.compute_and_output_dist(context, awaited).to_dict()
                found.append(torch.stack([pooled[name] for name in names]))
            model.train()
    found += [shard.tensor for value in model.state_dict().values() for shard in getattr(value, "local_shards", list)()]
    found += [value.detach() for value in model.parameters() if value.requires_grad]
    return [value.clone() for value in found]


def train_both_ways(folder):
    """What each of two processes does."""
    with join_process_group() as ranks:
        for case in CASES:
            found = expected = None
            plain = one_host.MemoryExchange
            pauses = {name: unpunctual(getattr(plain, name)) for name in ("look_up", "_update")}
            shared_sum = gradients_on_one_host.SharedSum
            late_sum = patch.object(
                shared_sum, "add_up_bucket", autospec=True, side_effect=unpunctual(shared_sum.add_up_bucket)
            )
            late_update = patch.object(TablesOfRank, "update", unpunctual(TablesOfRank.update, seed=1))
            with patch.multiple(plain, **pauses), late_update, late_sum as add_up:
                parts = built(ranks, case)
                by_memory = parts[2]._memory is not None
                if by_memory:
                    found = trained(*parts)
            if by_memory:
                plain_gradients = patch.object(sharded, "AddedUpOnOneHost", lambda _: DefaultDataParallelWrapper())
                with patch.object(one_host.MemoryExchange, "of", lambda *_, **__: None), plain_gradients:
                    expected = trained(*built(ranks, case))
            torch.save((by_memory and add_up.call_count >= 19, found, expected), folder / f"{case}-{ranks.rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By case and rank: whether it exchanged through memory in all steps, what was found, and what was expected."""
    folder = tmp_path_factory.mktemp("one-host")
    launch(train_both_ways, folder, processes=Processes(2))
    return {(case, rank): torch.load(folder / f"{case}-{rank}.pt") for case in CASES for rank in (0, 1)}


@pytest.mark.parametrize("case", CASES)
def test_embeddings_go_through_memory_where_tables_are_whole_and_nothing_is_rounded(case, results):
    assert [results[case, rank][0] for rank in (0, 1)] == [case in IN_MEMORY] * 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", IN_MEMORY)
def test_steps_and_predictions_have_the_same_bits_as_through_sockets(case, rank, results):
    _, found, expected = results[case, rank]
    assert len(found) == len(expected) > 3 * 19 + 8
    assert [i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if not torch.equal(one, other)] == []
    assert all(bool(value.isfinite().all()) for value in found)
