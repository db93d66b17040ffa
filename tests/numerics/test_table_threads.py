"""Tables dealt out to threads give the bits that FBGEMM's own forward and backward give."""

from types import SimpleNamespace

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn

from torchdlrm.tables.table_threads import use_table_threads

TABLES = [(50, 16), (3, 8), (400, 16), (7, 4), (120, 16)]  # rows, dimension
BATCH = 64


def kernel_and_model(optimizer, seed):
    """A kernel of FBGEMM's, and a module that holds it as TorchRec's sharded modules do."""
    torch.manual_seed(seed)
    specs = [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in TABLES]
    kernel = SplitTableBatchedEmbeddingBagsCodegen(specs, optimizer=optimizer, learning_rate=0.1, eps=1e-8)
    kernel.init_embedding_weights_uniform(-1.0, 1.0)
    model = nn.Module()
    model._lookups = [nn.ModuleList([kernel])]
    return SimpleNamespace(kernel=kernel, model=model)


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


@pytest.mark.parametrize("multi_valued", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize(
    "optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_SGD]
)
def test_threads_give_the_bits_of_fbgemm(optimizer, num_threads, multi_valued, seed):
    theirs, ours = kernel_and_model(optimizer, seed), kernel_and_model(optimizer, seed)
    use_table_threads(ours.model, num_threads=num_threads)
    assert ours.kernel.forward != theirs.kernel.forward
    for step, (ids, offsets, gradient) in enumerate(batches(seed, multi_valued=multi_valued)):
        for one in (theirs, ours):
            one.kernel.set_learning_rate(0.1 / (step + 1))  # a schedule's rate must reach the threads
        expected, found = theirs.kernel(ids, offsets), ours.kernel(ids, offsets)
        assert torch.equal(found, expected)
        expected.backward(gradient)
        found.backward(gradient)
    for mine, other in zip(ours.kernel.split_embedding_weights(), theirs.kernel.split_embedding_weights(), strict=True):
        assert torch.equal(mine, other)
    if optimizer != EmbOptimType.EXACT_SGD:
        assert torch.equal(ours.kernel.momentum1_host, theirs.kernel.momentum1_host)


def test_under_autocast_the_embeddings_come_out_rounded_once(seed):
    ours = kernel_and_model(EmbOptimType.EXACT_SGD, seed)
    use_table_threads(ours.model, num_threads=2)
    ids, offsets, _ = next(batches(seed, multi_valued=True))
    exact = ours.kernel(ids, offsets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = ours.kernel(ids, offsets)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, exact.bfloat16())


def test_casting_in_threads_leaves_this_threads_number_alone(seed):
    before = torch.get_num_threads()
    ours = kernel_and_model(EmbOptimType.EXACT_SGD, seed)
    use_table_threads(ours.model, num_threads=2)
    ids, offsets, gradient = next(batches(seed, multi_valued=False))
    ours.kernel(ids, offsets).backward(gradient)
    assert torch.get_num_threads() == before


def test_many_steps_on_many_threads_are_not_recorded_by_the_threads(seed):
    """Two threads write into one buffer: had one of them recorded it, the other could not write any more."""
    ours = kernel_and_model(EmbOptimType.EXACT_SGD, seed)
    use_table_threads(ours.model, num_threads=4)
    for ids, offsets, gradient in batches(seed, multi_valued=False, num_batches=300):
        out = ours.kernel(ids, offsets)
        assert [type(node).__name__ for node, _ in out.grad_fn.next_functions] == [
            "AccumulateGrad",
            *["NoneType"] * (len(out.grad_fn.next_functions) - 1),
        ]
        out.backward(gradient)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    "optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_SGD]
)
def test_a_row_of_padding_has_embeddings_of_zero_and_changes_no_table(optimizer, num_threads, seed):
    """With a row before it the tables take the step that the row alone makes them take."""
    padded, alone = kernel_and_model(optimizer, seed), kernel_and_model(optimizer, seed)
    for one in (padded, alone):
        use_table_threads(one.model, num_threads=num_threads)
    gradient = torch.randn(2, sum(dim for _, dim in TABLES))
    num_tables, none = len(TABLES), torch.zeros(0, dtype=torch.int64)
    before = [weights.clone() for weights in padded.kernel.split_embedding_weights()]
    out = padded.kernel(none, torch.zeros(num_tables + 1, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(1, gradient.shape[1]))
    out.backward(gradient[:1])
    assert all(map(torch.equal, padded.kernel.split_embedding_weights(), before))

    ids = torch.ones(num_tables, dtype=torch.int64)
    padded.kernel(ids, torch.tensor([0, *(n for table in range(num_tables) for n in (table + 1,) * 2)])).backward(
        gradient
    )
    alone.kernel(ids, torch.arange(num_tables + 1)).backward(gradient[:1])
    assert all(map(torch.equal, padded.kernel.split_embedding_weights(), alone.kernel.split_embedding_weights()))
    for found, expected in zip(*(one.kernel.split_optimizer_states() for one in (padded, alone)), strict=True):
        assert all(map(torch.equal, found, expected))
    assert not torch.equal(padded.kernel.split_embedding_weights()[0], before[0])
