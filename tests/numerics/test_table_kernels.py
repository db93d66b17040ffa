"""Our kernels look up and update tables on CPU as FBGEMM's do, and threads do not change a bit."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from helpers.table_references import Reference
from torchdlrm.kernels import threads
from torchdlrm.tables import collection
from torchdlrm.tables.collection import TablesOfRank
from torchdlrm.tables.kernels import look_up

TABLES = [(50, 16), (3, 8), (400, 16), (7, 4), (120, 16)]  # rows, dimension
BATCH = 64


def tables(kind, optimizer, seed):
    """Tables with the same weights, whether FBGEMM's module or ours."""
    torch.manual_seed(seed)
    specs = [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in TABLES]
    made = kind(specs, optimizer=optimizer, learning_rate=0.1, eps=1e-8)
    made.init_embedding_weights_uniform(-1.0, 1.0)
    return made


def batches(seed, *, multi_valued, num_batches=5):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        lengths = (
            torch.randint(0, 4, (len(TABLES) * BATCH,), generator=generator)
            if multi_valued
            else torch.ones(len(TABLES) * BATCH, dtype=torch.int64)
        )
        per_table = lengths.view(len(TABLES), BATCH).sum(1).tolist()
        ids = torch.cat(
            [
                torch.randint(rows, (count,), generator=generator)
                for (rows, _), count in zip(TABLES, per_table, strict=True)
            ]
        )
        gradient = torch.randn(BATCH, sum(dim for _, dim in TABLES), generator=generator)
        yield ids, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), gradient


@pytest.fixture(autouse=True)
def on_so_many_threads(request, monkeypatch):
    """A test's parameter `num_threads` is torch's number, and the least work is worth them all."""
    monkeypatch.setattr(threads, "MIN_FLOATS", 0)
    before = torch.get_num_threads()
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    torch.set_num_threads(parameters.get("num_threads", 2))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("multi_valued", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize(
    "optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_SGD]
)
def test_the_kernels_learn_as_fbgemm_does(optimizer, num_threads, multi_valued, seed):
    theirs, ours = (tables(kind, optimizer, seed) for kind in (SplitTableBatchedEmbeddingBagsCodegen, TablesOfRank))
    for step, (ids, offsets, gradient) in enumerate(batches(seed, multi_valued=multi_valued)):
        for one in (theirs, ours):
            one.set_learning_rate(0.1 / (step + 1))  # a schedule's rate must reach the kernels
        expected, found = theirs(ids, offsets), ours(ids, offsets)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        expected.backward(gradient)
        found.backward(gradient)
    for mine, other in zip(ours.split_embedding_weights(), theirs.split_embedding_weights(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    if optimizer != EmbOptimType.EXACT_SGD:
        torch.testing.assert_close(ours.momentum1_host, theirs.momentum1_host, rtol=1e-5, atol=1e-6)


def test_threads_do_not_change_a_bit_in_bfloat16(seed):
    """Nor does a gradient that is a slice of a wider one. In float32: `test_table_optimizers.py`."""
    states = []
    for num_threads in (1, 2, 4):
        torch.set_num_threads(num_threads)
        one = tables(TablesOfRank, EmbOptimType.EXACT_ROWWISE_ADAGRAD, seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for ids, offsets, gradient in batches(seed, multi_valued=True, num_batches=20):
                out = one(ids, offsets)
                assert out.dtype == torch.bfloat16
                wider = torch.nn.functional.pad(gradient.bfloat16(), (num_threads, 3))
                out.backward(wider[:, num_threads : num_threads + gradient.shape[1]])
        states.append((*one.split_embedding_weights(), one.momentum1_host))
    for other in states[1:]:
        assert all(map(torch.equal, states[0], other))


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [(EmbOptimType.EXACT_ROWWISE_ADAGRAD, "rowwise_adagrad"), (EmbOptimType.EXACT_ADAGRAD, "adagrad")],
)
def test_weights_of_ids_scale_embeddings_and_gradients(optimizer, name, seed):
    """Against float64, and the embeddings against FBGEMM's own kernel; threads change no bit."""
    found, references = [], None
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        generator = torch.Generator().manual_seed(seed)
        one = tables(TablesOfRank, optimizer, seed)
        theirs = tables(SplitTableBatchedEmbeddingBagsCodegen, optimizer, seed)
        all_weights = one.split_embedding_weights()
        references = [Reference(weights, name) for weights in all_weights]
        for ids, offsets, gradient in batches(seed, multi_valued=True):
            scales = torch.randn(len(ids), generator=generator)
            out = one(ids, offsets, scales)
            lengths = offsets.diff().view(len(TABLES), BATCH)
            rows = [torch.arange(BATCH).repeat_interleave(count) for count in lengths]
            places = zip(ids.split(lengths.sum(1).tolist()), scales.split(lengths.sum(1).tolist()), rows, strict=True)
            pooled = []
            for reference, grad, (mine, weights, row) in zip(
                references, gradient.split([dim for _, dim in TABLES], dim=1), places, strict=True
            ):
                scaled = reference.weights_RD[mine] * weights[:, None].double()
                pooled.append(torch.zeros(BATCH, grad.shape[1], dtype=torch.float64).index_add(0, row, scaled))
                reference.step(mine, grad[row].double() * weights[:, None].double(), 0.1)
            torch.testing.assert_close(out.double(), torch.cat(pooled, dim=1), rtol=1e-5, atol=1e-5)
            expected = theirs(ids, offsets, scales)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
            expected.backward(gradient)
            out.backward(gradient)
        found.append([weights.clone() for weights in all_weights])
        for weights, reference in zip(all_weights, references, strict=True):
            torch.testing.assert_close(weights.double(), reference.weights_RD, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, *found))


def test_threads_look_up_as_many_ids_however_many_a_cell_has(seed, monkeypatch):
    one = tables(TablesOfRank, EmbOptimType.EXACT_SGD, seed)
    lengths = torch.tensor([1, 1, 1, 1, 60]).repeat_interleave(BATCH)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids, parts = torch.zeros(int(lengths.sum()), dtype=torch.int64), []

    def watched(first_cell, end_cell, *arguments):
        parts.append((first_cell, end_cell))
        look_up(first_cell, end_cell, *arguments)

    monkeypatch.setattr(collection, "look_up", watched)
    found = one(ids, offsets)
    (first, middle), (middle_again, last) = sorted(parts)
    assert (first, middle, last) == (0, middle_again, len(lengths))
    assert abs(int(offsets[middle]) - len(ids) / 2) < 5 * BATCH
    rows = [weights[0] * count for weights, count in zip(one.split_embedding_weights(), (1, 1, 1, 1, 60), strict=True)]
    torch.testing.assert_close(found, torch.cat(rows).expand(BATCH, -1))


def test_features_that_share_a_table_update_it_once(seed):
    """Rows that both look up get the sum of their gradients."""
    learnt = []
    for kind in (SplitTableBatchedEmbeddingBagsCodegen, TablesOfRank):
        torch.manual_seed(seed)
        specs = [(9, 8, EmbeddingLocation.HOST, ComputeDevice.CPU), (5, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)]
        kernel = kind(
            specs, feature_table_map=[0, 0, 1], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.1
        )
        kernel.init_embedding_weights_uniform(-1.0, 1.0)
        for _ in range(3):
            ids = torch.randint(5, (3 * BATCH,))
            out = kernel(ids, torch.arange(3 * BATCH + 1))
            out.backward(torch.randn_like(out))
        learnt.append((out.detach(), *kernel.split_embedding_weights(), kernel.momentum1_host))
    for expected, found in zip(*learnt, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_under_autocast_the_embeddings_come_out_rounded_once(seed):
    ours = tables(TablesOfRank, EmbOptimType.EXACT_SGD, seed)
    ids, offsets, _ = next(batches(seed, multi_valued=True))
    exact = ours(ids, offsets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = ours(ids, offsets)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    "optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_SGD]
)
def test_a_row_of_padding_has_embeddings_of_zero_and_changes_no_table(optimizer, num_threads, seed):
    """With a row before it the tables take the step that the row alone makes them take."""
    padded, alone = (tables(TablesOfRank, optimizer, seed) for _ in range(2))
    gradient = torch.randn(2, sum(dim for _, dim in TABLES))
    num_tables, none = len(TABLES), torch.zeros(0, dtype=torch.int64)
    before = [weights.clone() for weights in padded.split_embedding_weights()]
    out = padded(none, torch.zeros(num_tables + 1, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(1, gradient.shape[1]))
    out.backward(gradient[:1])
    assert all(map(torch.equal, padded.split_embedding_weights(), before))

    ids = torch.ones(num_tables, dtype=torch.int64)
    padded(ids, torch.tensor([0, *(n for table in range(num_tables) for n in (table + 1,) * 2)])).backward(gradient)
    alone(ids, torch.arange(num_tables + 1)).backward(gradient[:1])
    assert all(map(torch.equal, padded.split_embedding_weights(), alone.split_embedding_weights()))
    for found, expected in zip(*(one.split_optimizer_states() for one in (padded, alone)), strict=True):
        assert all(map(torch.equal, found, expected))
    assert not torch.equal(padded.split_embedding_weights()[0], before[0])
