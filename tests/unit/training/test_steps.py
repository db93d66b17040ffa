"""The steps of a run: when it ends, validates and stops early, and at which learning rate."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchdlrm.config import ScheduleConfig, load_config
from torchdlrm.errors import ConfigError
from torchdlrm.training.checkpoint import Position
from torchdlrm.training.steps import Agenda, Stopwatch, after_validation, check_validations, learning_rate


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


def check(*, rows=1_000, validation_rows=100, **keys):
    settings = {name.replace("__", "."): str(value) for name, value in keys.items()}
    config = load_config(None, {"train.batch_size_global": "10"} | settings)
    check_validations(config, Agenda.of(config, rows), validation_rows=validation_rows)


@pytest.mark.parametrize(
    "stop", [{"stop__target_auc": 0.8}, {"stop__patience_validations": 2}, {"schedule__name": "plateau"}]
)
def test_without_validations_before_the_end_it_is_refused(stop):
    key = next(iter(stop)).replace("__", ".")
    with pytest.raises(ConfigError, match=rf"{key}: is .* validated at its end only; set validation\.every_steps"):
        check(**stop)
    with pytest.raises(ConfigError, match=rf"{key}: is .* the dataset's val split has no rows"):
        check(**stop, validation__every_steps=10, validation_rows=0)
    check(**stop, validation__every_steps=10)
    check(**stop, validation__every_rows=100)


@pytest.mark.parametrize("unit", [{"validation__every_steps": 25}, {"validation__every_rows": 250}])
def test_patience_needs_one_validation_more_than_it_waits_for_before_the_last_step(unit):
    check(stop__patience_validations=2, **unit)  # at the steps 25, 50 and 75 of 100
    message = r"stop\.patience_validations: is 3 .* needs 4 validations before the last step, 100, and the run has 3"
    with pytest.raises(ConfigError, match=message):
        check(stop__patience_validations=3, **unit)
    check(stop__patience_validations=3, train__epochs=2, **unit)


def test_a_plateau_needs_validations_before_the_last_step_like_patience_does():
    plateau = {"schedule__name": "plateau", "schedule__plateau_patience_validations": 3}
    message = (
        r"schedule\.name: is plateau, with plateau_patience_validations = 3, and could never reduce the rate: "
        r"needs 4 validations before the last step, 100, and the run has 3"
    )
    with pytest.raises(ConfigError, match=message):
        check(**plateau, validation__every_steps=25)
    check(**plateau, validation__every_steps=20)


def rates(config, steps, num_steps=10_000):
    return [learning_rate(0.5, step, config, num_steps=num_steps) for step in steps]


HALF_COSINE = [0.25 * (1 + math.cos(math.pi * (step - 2) / 8)) for step in range(3, 10)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.5] * 10),
        ({"warmup_steps": 4}, [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]),  # linear, up to the base rate
        ({"name": "constant", "warmup_steps": 2}, [0.25, 0.5, 0.5, 0.5, 0.5]),
        # Quadratic from its start to the floor, with and without a warm-up.
        (
            {"warmup_steps": 2, "decay_start_step": 4, "decay_steps": 5},
            [0.25, 0.5, 0.5, 0.5, *(0.5 * ((9 - step) / 5) ** 2 for step in range(5, 9)), 1e-7, 1e-7],
        ),
        ({"decay_start_step": 0, "decay_steps": 2}, [0.125, 1e-7, 1e-7]),
        # From the end of the warm-up to the last step.
        ({"name": "cosine", "warmup_steps": 2}, [0.25, 0.5, *HALF_COSINE, 1e-7]),
    ],
)
def test_rates_are_those_of_the_formula(settings, expected):
    steps = range(1, len(expected) + 1)
    assert rates(ScheduleConfig(**settings), steps, num_steps=10) == pytest.approx(expected)


def test_a_decay_without_a_length_ends_with_the_run_and_one_with_a_length_where_it_says():
    open_end = ScheduleConfig(name="warmup_polynomial", decay_start_step=4)
    said = ScheduleConfig(name="warmup_polynomial", decay_start_step=4, decay_steps=6)
    assert rates(open_end, range(1, 11), num_steps=10) == rates(said, range(1, 11), num_steps=99)
    assert rates(open_end, [10], num_steps=10) == [1e-7]


def validated(aucs, config):
    """The position after validations with these AUCs, at the steps 1, 2, ..., and every one before."""
    positions = [Position(0, {})]
    for step, auc in enumerate(aucs, 1):
        positions.append(after_validation(replace(positions[-1], step=step), auc, config))
    return positions


@given(
    st.lists(st.sampled_from([0.5, 0.6, 0.7, 0.75, 0.8]), max_size=30), st.integers(1, 4), st.sampled_from([0.1, 0.5])
)
def test_plateau_is_the_schedule_of_torch(aucs, patience, factor):
    config = ScheduleConfig(name="plateau", plateau_factor=factor, plateau_patience_validations=patience)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    # Torch counts validations that are borne, and would ignore small rises and small changes of the rate.
    expected = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", factor=factor, patience=patience - 1, threshold=0.0, min_lr=0.5e-3, eps=0.0
    )
    for step, position in enumerate(validated(aucs, config)):
        if step:
            expected.step(aucs[step - 1])
        rate = learning_rate(0.5, step + 1, config, num_steps=99, plateau_scale=position.plateau_scale)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_a_plateau_keeps_the_best_validation_and_counts_those_since_for_early_stopping_too():
    found = validated([0.6, 0.7, 0.65, 0.7, 0.71, 0.7], ScheduleConfig(name="plateau"))
    expected = [(None, None, 0), (0.6, 1, 0), (0.7, 2, 0), (0.7, 2, 1), (0.7, 2, 2), (0.71, 5, 0), (0.71, 5, 1)]
    assert [(position.best_auc, position.best_step, position.stale_validations) for position in found] == expected
    assert [position.plateau_scale for position in found] == pytest.approx([1, 1, 1, 0.1, 0.01, 0.01, 0.001])


def test_an_undefined_auc_is_stale_but_does_not_reduce_the_rate():
    last = validated([0.6, math.nan, math.nan], ScheduleConfig(name="plateau"))[-1]
    assert (last.best_auc, last.stale_validations, last.plateau_scale) == (0.6, 2, 1.0)


def test_a_plateau_scales_the_warm_up_too_and_no_other_kind_reads_it():
    warm = ScheduleConfig(name="plateau", warmup_steps=4)
    assert [learning_rate(0.8, step, warm, num_steps=9, plateau_scale=0.5) for step in (1, 2, 4, 5)] == [
        0.1,
        0.2,
        0.4,
        0.4,
    ]
    constant = ScheduleConfig(name="constant")
    assert learning_rate(0.8, 5, constant, num_steps=9, plateau_scale=0.5) == 0.8
    assert validated([0.6, 0.5], constant)[-1].plateau_scale == 1.0


def test_configs_without_a_name_mean_what_they_meant():
    decays = load_config(None, {"schedule.decay_start_step": "3", "schedule.decay_steps": "4"}).schedule
    assert rates(decays, [3, 5, 7, 8], num_steps=100) == pytest.approx([0.5, 0.125, 1e-7, 1e-7])
    assert rates(load_config(None, {"schedule.decay_steps": "0"}).schedule, [1, 9], num_steps=9) == [0.5, 0.5]


def test_a_pause_is_no_time_of_a_stopwatch(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("torchdlrm.training.steps.time.monotonic", lambda: now[0])
    watch = Stopwatch()
    now[0] += 3
    with watch.paused():
        now[0] += 50
    now[0] += 4
    assert watch.elapsed_s == 7
    watch.restart()
    assert watch.elapsed_s == 0


def test_the_loader_is_where_the_step_is():
    found = agenda(10, 4, epochs=2)
    expected = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert [tuple(found.loader_state(step).values()) for step in range(7)] == expected
