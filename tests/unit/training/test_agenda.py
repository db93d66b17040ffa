"""When a run ends, and when it validates."""

from hypothesis import given
from hypothesis import strategies as st

from torchdlrm.config import load_config
from torchdlrm.training.agenda import Agenda


def agenda(rows, batch_size, epochs=1, **more):
    overrides = {"train.batch_size_global": str(batch_size), "train.epochs": str(epochs)}
    return Agenda.of(load_config(None, overrides | {f"train.{key}": str(value) for key, value in more.items()}), rows)


def test_the_last_batch_of_an_epoch_may_be_smaller():
    found = agenda(10, 4, epochs=2)
    assert (found.steps_per_epoch, found.num_steps) == (3, 6)
    assert [found.rows_after(step) for step in range(7)] == [0, 4, 8, 10, 14, 18, 20]


def test_max_steps_ends_a_run_and_never_lengthens_it():
    assert agenda(10, 4, epochs=2, max_steps=5).num_steps == 5
    assert agenda(10, 4, epochs=2, max_steps=50).num_steps == 6


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 3), st.integers(1, 500))
def test_by_rows_it_is_time_at_the_first_step_that_reaches_each_multiple(rows, batch_size, epochs, every_rows):
    found = agenda(rows, batch_size, epochs)
    due = [step for step in range(1, found.num_steps + 1) if found.is_due(step, 0, every_rows)]
    expected = {
        next(step for step in range(1, found.num_steps + 1) if found.rows_after(step) >= multiple)
        for multiple in range(every_rows, rows * epochs + 1, every_rows)
    }
    assert due == sorted(expected | {found.num_steps})
