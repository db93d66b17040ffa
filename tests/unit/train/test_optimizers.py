import pytest

from torchdlrm.config import ScheduleConfig
from torchdlrm.train.optimizers import learning_rate


def rates(config, steps):
    return [learning_rate(0.5, step, config) for step in steps]


def test_without_a_schedule_the_rate_is_the_base_rate():
    assert rates(ScheduleConfig(), [1, 10, 10_000]) == [0.5, 0.5, 0.5]


def test_warm_up_is_linear_and_reaches_the_base_rate():
    config = ScheduleConfig(warmup_steps=4)
    assert rates(config, range(1, 7)) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def test_decay_is_quadratic_from_its_start_and_stops_at_the_floor():
    config = ScheduleConfig(warmup_steps=2, decay_start_step=4, decay_steps=10)
    expected = [0.25, 0.5, 0.5, 0.5] + [0.5 * ((10 - (step - 4)) / 10) ** 2 for step in range(5, 14)] + [1e-7, 1e-7]
    assert rates(config, range(1, 16)) == pytest.approx(expected)


def test_decay_works_without_warm_up():
    config = ScheduleConfig(decay_start_step=0, decay_steps=2)
    assert rates(config, [1, 2, 3]) == pytest.approx([0.125, 1e-7, 1e-7])
