"""Rows that come several times in a batch: one step with the sum of their gradients, and what its rounding may cost.

N ids of a batch, R rows of a table, D its dimension.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from torchdlrm.config import load_config
from torchdlrm.loader.loader import Loader
from torchdlrm.model.architecture import ModelShape
from torchdlrm.tables.collection import TablesOfRank
from torchdlrm.tables.optimizers import table_kernels
from torchdlrm.training.pipeline import build_pipeline
from torchdlrm.training.processes.process_group import join_process_group
from torchdlrm.training.sharded import StepCounters, build_optimizer, build_sharded_model

UNIT = 2.0**-24  # half of the distance of 1 to the next float32
RATE, EPS, D = 0.05, 1e-8, 8
OPTIONS = {
    "model.embedding_dim": str(D),
    "model.dense_arch_layer_sizes": f"16,{D}",
    "model.over_arch_layer_sizes": "16,1",
    "table_optimizer.learning_rate": str(RATE),
    "table_optimizer.eps": str(EPS),
    "train.batch_size_global": "64",
}


@pytest.fixture
def built(small_dataset):
    """Builds what training builds: built(name, accumulator) -> model, pipeline, the kernel of its tables."""
    with join_process_group() as ranks:

        def build(name, accumulator=0.0):
            start = {"table_optimizer.initial_accumulator": str(accumulator)} if accumulator else {}
            config = load_config(None, {**OPTIONS, "table_optimizer.name": name, **start})
            model = build_sharded_model(
                config,
                ModelShape.of(config.model, small_dataset),
                dense_sample=None,
                ranks=ranks,
            ).module
            optimizer = build_optimizer(model, config.dense_optimizer)
            pipeline = build_pipeline(model, optimizer, dtype=torch.float32, ranks=ranks)
            (kernel,) = table_kernels(model)
            return model, pipeline, kernel

        yield build


class Step:
    """A step of one table in float64, on the sum of each row's gradients, and how far float32 may be from it.

    Each sum of n float32 is off by no more than n rounding errors of the sum of magnitudes.  Adagrad divides it by the
    root of what it has seen so far, and that of a row that is new is the sum itself: so where gradients cancel, the
    error is divided by next to nothing.
    """

    def __init__(self, name: str, weights_RD: Tensor, squares: Tensor | None, ids_N: Tensor, grads_ND: Tensor) -> None:
        zeros_RD = torch.zeros(weights_RD.shape, dtype=torch.float64)
        grads_ND = grads_ND.double()
        sum_RD = zeros_RD.index_add(0, ids_N, grads_ND)
        error_RD = zeros_RD.index_add(0, ids_N, grads_ND.abs()) * UNIT
        error_RD *= torch.bincount(ids_N, minlength=len(weights_RD))[:, None]
        least_RD = (sum_RD.abs() - error_RD).clamp(min=0)  # the sum, where rounding makes it smallest
        if name == "sgd":
            divisor = least_divisor = torch.ones(1, dtype=torch.float64)
            rounding_of_divisor = 0.0
        else:
            assert squares is not None
            before = squares.double().view(len(weights_RD), -1)  # a value a weight, or a value a row
            mean = partial(torch.mean, dim=1, keepdim=True) if before.shape[1] == 1 else (lambda x: x)
            divisor = (before + mean(sum_RD**2)).sqrt() + EPS
            least_divisor = (before + mean(least_RD**2)).sqrt() + EPS
            rounding_of_divisor = sum_RD.abs() * mean(error_RD**2).sqrt() / divisor
        step_RD = RATE * sum_RD / divisor
        self.after_RD = weights_RD.double() - step_RD
        amplified_RD = RATE * (error_RD + rounding_of_divisor) / least_divisor
        self.bound_RD = amplified_RD + 16 * UNIT * (weights_RD.double().abs() + step_RD.abs())


@pytest.mark.parametrize("name", ["adagrad", "rowwise_adagrad", "sgd"])
def test_each_step_of_a_training_is_that_of_float64_but_for_the_rounding_of_sums(
    name, built, small_dataset, monkeypatch
):
    """Twenty steps; each starts from the table as it is, so that errors do not add up."""
    model, pipeline, kernel = built(name)
    plain_update = TablesOfRank.update
    bounds, excesses, moves = [], [], []

    def update(lookup, grad_BC, ids_of_batch):
        tables = kernel.split_embedding_weights()
        ids = ids_of_batch.indices.view(len(tables), -1)
        states = kernel.split_optimizer_states() if name != "sgd" else [[None]] * len(tables)
        steps = [
            Step(name, table.detach(), state[0], table_ids, grads)
            for table, state, table_ids, grads in zip(tables, states, ids, grad_BC.split(D, dim=1), strict=True)
        ]
        before = [table.detach().clone() for table in tables]
        plain_update(lookup, grad_BC, ids_of_batch)
        for step, table, was in zip(steps, tables, before, strict=True):
            bounds.append(step.bound_RD.flatten())
            excesses.append(((table.detach().double() - step.after_RD).abs() - step.bound_RD).max())
            moves.append((table.detach() - was).abs().max())

    monkeypatch.setattr(TablesOfRank, "update", update)
    loader = Loader(small_dataset, "train", batch_size_global=64, max_rows=20 * 64)
    counters, batches = StepCounters(model, seed=0, rank=0), iter(loader)
    for step in range(1, loader.batches_per_epoch + 1):
        counters.begin(step)
        pipeline.progress(batches)
    assert len(bounds) == loader.batches_per_epoch * 26
    assert min(moves) > 1e-7
    assert max(excesses) <= 0
    all_bounds = torch.cat(bounds)
    assert (all_bounds < 1e-6).double().mean() > 0.99
    # Gradients of one column of a row often cancel, those of all columns at once hardly ever.
    assert (all_bounds.max() > 1e-5) == (name == "adagrad")


def stepped(built, name, grads, accumulator=0.0):
    """What row 3 of the first table has moved by after one step, each of the gradients being of a row of the batch."""
    _, _, kernel = built(name, accumulator)
    weights_RD = kernel.split_embedding_weights()[0]
    before = weights_RD[3].detach().clone()
    num_tables = len(kernel.embedding_specs)
    ids = torch.tensor([3] * len(grads) + [0] * len(grads) * (num_tables - 1))
    out = kernel(ids, torch.arange(len(ids) + 1))
    grads_BC = torch.zeros_like(out)
    grads_BC[:, :D] = torch.tensor(grads)[:, None]
    out.backward(grads_BC)
    return (weights_RD[3].detach() - before).double()


@pytest.mark.parametrize("name", ["adagrad", "rowwise_adagrad"])
def test_a_row_that_repeats_takes_one_step_and_not_one_for_each_time(name, built):
    for times in (1, 2, 5):
        moved = stepped(built, name, [1e-3] * times)
        torch.testing.assert_close(moved, torch.full((D,), -RATE, dtype=torch.float64), atol=1e-6, rtol=0)
    for started in (0.5, 0.01):
        moved, expected = stepped(built, name, [0.3, 0.2], accumulator=started), -RATE * 0.5 / (started + 0.25) ** 0.5
        torch.testing.assert_close(moved, torch.full((D,), expected, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["adagrad", "rowwise_adagrad"])
def test_where_gradients_cancel_the_order_of_rows_decides_on_a_step_unless_the_accumulator_has_a_start(name, built):
    """1e-8 is lost when it is added to 1, and is not when the 1 has gone: by a new row that is half a step."""
    lost, kept = [1.0, 1e-8, -1.0], [1.0, -1.0, 1e-8]
    assert stepped(built, name, lost).abs().max() == 0
    torch.testing.assert_close(
        stepped(built, name, kept), torch.full((D,), -RATE / 2, dtype=torch.float64), atol=1e-6, rtol=0
    )
    for grads in (lost, kept):
        assert stepped(built, name, grads, accumulator=0.01).abs().max() < 1e-7
