"""Every optimizer of the tables, with every weight decay, against an independent computation; the same on any threads.

T tables, B rows of a batch, N ids of a table.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from helpers.table_references import Reference
from torchdlrm.config import TABLE_OPTIMIZERS, TableOptimizerConfig
from torchdlrm.errors import ConfigError
from torchdlrm.kernels import threads
from torchdlrm.tables.collection import TablesOfRank
from torchdlrm.tables.optimizers import check_table_optimizer, fused_params, set_steps_done

TABLES = [(50, 16), (3, 8), (400, 16), (7, 4), (1000, 16)]  # rows, dimension
BATCH, STEPS = 32, 100
NO_DECAY = "none"
CASES = [
    (name, mode) for name, record in TABLE_OPTIMIZERS.items() for mode in (NO_DECAY, *sorted(record.decays_on_cpu))
]


def tables_of(config, seed, **options):
    """The tables as TorchRec builds them on CPU, with weights that depend on the seed alone."""
    specs = [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows, dim in TABLES]
    kernel = TablesOfRank(specs, **fused_params(config), **options)
    torch.manual_seed(seed)
    kernel.init_embedding_weights_uniform(-1.0, 1.0)
    return kernel


def batches(seed, num_batches=STEPS, batch=BATCH):
    """Ids and offsets of cells with none to three ids, and a gradient; half of a table's ids are of its first rows."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        lengths = torch.randint(0, 4, (len(TABLES), batch), generator=generator)
        ids = []
        for (rows, _), count in zip(TABLES, lengths.sum(1).tolist(), strict=True):
            often = torch.rand(count, generator=generator) < 0.5
            at = torch.randint(rows, (count,), generator=generator)
            ids.append(torch.where(often, at % min(rows, 5), at))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
        yield torch.cat(ids), offsets, torch.randn(batch, sum(dim for _, dim in TABLES), generator=generator)


def per_table(ids, offsets, grads):
    """Ids of each table, and the gradient of each id: that of its cell."""
    lengths_TB = offsets.diff().view(len(TABLES), -1)
    counts = lengths_TB.sum(1).tolist()
    dims = [dim for _, dim in TABLES]
    for ids_N, lengths_B, grad_BD in zip(ids.split(counts), lengths_TB, grads.split(dims, dim=1), strict=True):
        yield ids_N, grad_BD.repeat_interleave(lengths_B, dim=0)


def settings(name, mode, **others):
    decay = {} if mode == NO_DECAY else {"weight_decay": 0.1, "weight_decay_mode": mode}
    return TableOptimizerConfig(name=name, **decay, **others)


@pytest.fixture(autouse=True)
def deals_out_everything(monkeypatch):
    """Also these few rows are dealt out to as many threads as torch has; afterwards it has as many as before."""
    monkeypatch.setattr(threads, "MIN_FLOATS", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_100_steps_are_those_of_the_papers(name, mode, seed):
    config = settings(name, mode, beta1=0.8, beta2=0.95)
    steps = list(batches(seed))
    # Lazy decay takes the rate of the step that looks the row up for those that did not.
    rates = [0.02 if mode == "lazy" else 0.02 * (1 - step / (2 * STEPS)) for step in range(STEPS)]
    kernel = tables_of(config, seed)
    known = {"eps": config.eps, "beta1": 0.8, "beta2": 0.95, "decay": config.weight_decay, "mode": mode}
    references = [Reference(weights, name, **known) for weights in kernel.split_embedding_weights()]
    for (ids, offsets, grads), rate in zip(steps, rates, strict=True):
        kernel.set_learning_rate(rate)
        kernel(ids, offsets).backward(grads)
        for reference, (ids_N, grads_ND) in zip(references, per_table(ids, offsets, grads), strict=True):
            reference.step(ids_N, grads_ND, rate)
    for found_RD, reference in zip(kernel.split_embedding_weights(), references, strict=True):
        caught_up_RD = found_RD.double() * reference.owed_R[:, None]
        torch.testing.assert_close(caught_up_RD, reference.weights_RD, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_steps_have_the_same_bytes_on_any_number_of_threads(name, mode, seed):
    steps = list(batches(seed, 30))
    found = []
    for num_threads in (1, 2, 4):
        torch.set_num_threads(num_threads)
        kernel = tables_of(settings(name, mode), seed)
        for ids, offsets, grads in steps:
            kernel(ids, offsets).backward(grads)
        states = kernel.split_optimizer_states()
        found.append([*kernel.split_embedding_weights(), *(state for of_table in states for state in of_table)])
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


FEW_STEPS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_table_optimizers import batches, settings, tables_of
for name in ("adam", "lamb"):
    kernel = tables_of(settings(name, "decoupled"), 0)
    for ids, offsets, grads in batches(0, 10):
        kernel(ids, offsets).backward(grads)
    print(kernel.weights_host.detach().view(torch.int32).sum().item())
"""


@pytest.mark.thorough
def test_the_process_that_compiles_the_kernels_computes_the_bytes_of_those_that_load_them(tmp_path):
    here = Path(__file__).parent
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(here.parent)}
    command = [sys.executable, "-c", FEW_STEPS, str(here)]
    compiled, loaded = (subprocess.check_output(command, env=environment, text=True) for _ in range(2))
    assert compiled == loaded


def test_lazy_decay_takes_the_rate_of_the_step_that_looks_the_row_up(seed):
    kernel = tables_of(settings("sgd", "lazy"), seed)
    before = kernel.split_embedding_weights()[0].clone()
    look_up = [torch.zeros(len(TABLES), dtype=torch.int64), torch.arange(len(TABLES) + 1)]
    nothing = torch.zeros(1, sum(dim for _, dim in TABLES))
    for step, rate in ((1, 0.5), (2, 0.4), (5, 0.3)):
        set_steps_done([kernel], step - 1)
        kernel.set_learning_rate(rate)
        kernel(*look_up).backward(nothing)
    expected = before[0] * (1 - 0.5 * 0.1) * (1 - 0.4 * 0.1) * (1 - 0.3 * 0.1) ** 3
    torch.testing.assert_close(kernel.split_embedding_weights()[0][0], expected)
    assert torch.equal(kernel.split_embedding_weights()[0][1:], before[1:])
    assert kernel.prev_iter_host[:2].tolist() == [5, 0]


def test_lazy_decay_counts_steps_beyond_what_a_float32_can(seed):
    kernel = tables_of(settings("sgd", "lazy"), seed)
    look_up = [torch.zeros(len(TABLES), dtype=torch.int64), torch.arange(len(TABLES) + 1)]
    nothing = torch.zeros(1, sum(dim for _, dim in TABLES))
    kernel.set_learning_rate(0.5)
    for step in (2**24 + 1, 2**24 + 2, 2**24 + 3):
        before = kernel.split_embedding_weights()[0][0].clone()
        set_steps_done([kernel], step - 1)
        kernel(*look_up).backward(nothing)
        torch.testing.assert_close(kernel.split_embedding_weights()[0][0], before * (1 - 0.5 * 0.1))
        assert kernel.prev_iter_host[0] == step


def test_steps_are_counted_and_not_lookups(seed):
    """A validation between two steps looks up, too: Adam's first step is one of the learning rate all the same."""
    kernel = tables_of(settings("adam", NO_DECAY), seed)
    before = kernel.split_embedding_weights()[0].clone()
    look_up = [torch.zeros(len(TABLES), dtype=torch.int64), torch.arange(len(TABLES) + 1)]
    for _ in range(3):
        out = kernel(*look_up)
    out.backward(torch.full_like(out, 1e-3))
    moved = before[0] - kernel.split_embedding_weights()[0][0]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), atol=1e-5, rtol=0)
    assert int(kernel.iter_cpu) == 1


def test_rows_of_zeros_and_gradients_of_zeros_stay_numbers_in_lamb(seed):
    kernel = tables_of(settings("lamb", NO_DECAY), seed)
    weights = kernel.split_embedding_weights()[0]
    weights[1] = 0
    before = weights.clone()
    ids = torch.tensor([0, 1] + [0] * 2 * (len(TABLES) - 1))
    grads = torch.zeros(2, sum(dim for _, dim in TABLES))
    grads[1] = 1
    kernel(ids, torch.arange(len(ids) + 1)).backward(grads)
    assert torch.equal(weights, before)  # no gradient: nowhere to go; no length: FBGEMM's ratio is zero, too


@pytest.mark.parametrize("name", ["lamb", "partial_rowwise_lamb"])
def test_lamb_without_weight_decay_is_refused_on_gpus_where_a_gradient_of_zeros_would_make_a_row_nan(name):
    """FBGEMM's step, by the formula of its kernels: the reference has no guard either."""
    weights = torch.ones(1, 4, dtype=torch.float64)
    for decay, is_finite in ((0.0, False), (1e-6, True)):
        reference = Reference(weights, name, decay=decay, mode="decoupled")
        reference.step(torch.tensor([0]), torch.zeros(1, 4), 0.1)
        assert bool(torch.isfinite(reference.weights_RD).all()) == is_finite
        config = TableOptimizerConfig(name=name, weight_decay=decay)
        check_table_optimizer(config, torch.device("cpu"))
        if is_finite:
            check_table_optimizer(config, torch.device("cuda"))
    with pytest.raises(ConfigError, match=rf"^table_optimizer.weight_decay: {name} needs some on GPUs, got 0: .* 1e-6"):
        check_table_optimizer(TableOptimizerConfig(name=name), torch.device("cuda"))


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
def test_the_state_on_cpu_is_that_of_fbgemm_on_a_gpu(name, seed):
    """Names, shapes and types; on the meta device FBGEMM builds what it builds on a GPU."""
    params = fused_params(settings(name, NO_DECAY))
    specs = [(rows, dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA) for rows, dim in TABLES]
    on_gpu = SplitTableBatchedEmbeddingBagsCodegen(specs, device=torch.device("meta"), **params)
    found, expected = (
        [
            {name: (state.shape, state.dtype) for name, state in of_table.items()}
            for of_table in kernel.get_optimizer_state()
        ]
        for kernel in (tables_of(settings(name, NO_DECAY), seed), on_gpu)
    )
    assert found == expected
