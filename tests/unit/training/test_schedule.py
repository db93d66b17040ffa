import math

import pytest

from torchdlrm.config import ScheduleConfig, load_config
from torchdlrm.training.schedule import learning_rate


def rates(config, steps, num_steps=10_000):
    return [learning_rate(0.5, step, config, num_steps=num_steps) for step in steps]


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


def test_cosine_goes_from_the_end_of_the_warm_up_to_the_last_step():
    config = ScheduleConfig(name="cosine", warmup_steps=2)
    expected = [0.25, 0.5] + [0.25 * (1 + math.cos(math.pi * (step - 2) / 8)) for step in range(3, 10)] + [1e-7]
    assert rates(config, range(1, 11), num_steps=10) == pytest.approx(expected)


def test_a_decay_without_a_length_ends_with_the_run_and_one_with_a_length_where_it_says():
    open_end = ScheduleConfig(name="warmup_polynomial", decay_start_step=4)
    said = ScheduleConfig(name="warmup_polynomial", decay_start_step=4, decay_steps=6)
    assert rates(open_end, range(1, 11), num_steps=10) == rates(said, range(1, 11), num_steps=99)
    assert rates(open_end, [10], num_steps=10) == [1e-7]


def test_constant_holds_the_base_rate_after_its_warm_up():
    config = ScheduleConfig(name="constant", warmup_steps=2)
    assert rates(config, range(1, 6), num_steps=5) == [0.25, 0.5, 0.5, 0.5, 0.5]


def test_configs_without_a_name_mean_what_they_meant():
    decays = load_config(None, {"schedule.decay_start_step": "3", "schedule.decay_steps": "4"}).schedule
    assert rates(decays, [3, 5, 7, 8], num_steps=100) == pytest.approx([0.5, 0.125, 1e-7, 1e-7])
    assert rates(load_config(None, {"schedule.decay_steps": "0"}).schedule, [1, 9], num_steps=9) == [0.5, 0.5]
