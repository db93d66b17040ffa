"""What the tables' optimizers are compared with is itself torch's, wherever torch has the optimizer."""

import pytest
import torch

from helpers.table_references import Reference

ROWS, DIM, STEPS, RATE = 12, 4, 30, 0.05
SPARSE = {
    "sgd": lambda weights: torch.optim.SGD([weights], lr=RATE),
    "adagrad": lambda weights: torch.optim.Adagrad([weights], lr=RATE, eps=1e-8),
    "adam": lambda weights: torch.optim.SparseAdam([weights], lr=RATE, eps=1e-12),
}
DECAYING = {
    ("sgd", "l2"): lambda weights: torch.optim.SGD([weights], lr=RATE, weight_decay=0.1),
    ("adagrad", "l2"): lambda weights: torch.optim.Adagrad([weights], lr=RATE, eps=1e-8, weight_decay=0.1),
    ("adam", "l2"): lambda weights: torch.optim.Adam([weights], lr=RATE, weight_decay=0.1),
    ("adam", "decoupled"): lambda weights: torch.optim.AdamW([weights], lr=RATE, weight_decay=0.1),
    ("adam", "lazy"): lambda weights: torch.optim.AdamW([weights], lr=RATE, weight_decay=0.1),
}


def batch(generator, num_ids=8):
    ids = torch.randint(0, ROWS, (num_ids,), generator=generator)
    return ids, torch.randn(num_ids, DIM, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", SPARSE)
def test_without_decay_rows_move_as_torchs_sparse_optimizers_move_them(name, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(ROWS, DIM, dtype=torch.float64, generator=generator)
    reference = Reference(weights, name, eps=1e-12 if name == "adam" else 1e-8)
    optimizer = SPARSE[name](weights)
    for _ in range(STEPS):
        ids, grads = batch(generator)
        reference.step(ids, grads, RATE)
        with torch.sparse.check_sparse_tensor_invariants():
            weights.grad = torch.sparse_coo_tensor(ids[None], grads, weights.shape).coalesce()
            optimizer.step()
    torch.testing.assert_close(reference.weights_RD, weights, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("name", "mode"), DECAYING)
def test_where_every_step_looks_up_every_row_they_decay_as_torchs_dense_optimizers_do(name, mode, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(ROWS, DIM, dtype=torch.float64, generator=generator)
    reference = Reference(weights, name, decay=0.1, mode=mode)
    optimizer = DECAYING[name, mode](weights)
    for _ in range(STEPS):
        ids, grads = torch.arange(ROWS), torch.randn(ROWS, DIM, dtype=torch.float64, generator=generator)
        reference.step(ids, grads, RATE)
        weights.grad = grads
        optimizer.step()
    torch.testing.assert_close(reference.weights_RD, weights, atol=1e-9, rtol=0)


def test_lazy_decay_is_adamws_of_rows_without_a_gradient(seed):
    """A row that no later step looks up decays as AdamW's would if its gradient and moments were zero."""
    weights = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(seed))
    reference = Reference(weights, "sgd", decay=0.1, mode="lazy")
    reference.step(torch.arange(ROWS), torch.zeros(ROWS, DIM), RATE)
    for _ in range(9):
        reference.step(torch.tensor([0]), torch.zeros(1, DIM), RATE)
    torch.testing.assert_close(reference.weights_RD, weights.double() * (1 - RATE * 0.1) ** 10, atol=1e-9, rtol=0)
    assert reference.owed_R[0] == 1
    torch.testing.assert_close(reference.owed_R[1:], torch.full((ROWS - 1,), (1 - RATE * 0.1) ** 9).double())
