"""Learning rates over steps: one schedule for the tables' optimizer and for the dense one."""

import math

from torchrec.optim.keyed import CombinedOptimizer

from torchdlrm.config import ScheduleConfig

MIN_LEARNING_RATE = 1e-7


class Schedule:
    """Sets the learning rate of every step.

    Args:
        config: the policy.
        optimizer: its parameter groups hold their base rates when the schedule is made.
        num_steps: the run's last step.
    """

    def __init__(self, config: ScheduleConfig, optimizer: CombinedOptimizer, *, num_steps: int) -> None:
        self._config, self._num_steps = config, num_steps
        self._groups = [(group, float(group["lr"])) for group in optimizer.param_groups]

    def set(self, step: int) -> float:
        """Set the rates of step `step` (from 1); returns that of the dense optimizer."""
        rate = 0.0
        for group, base in self._groups:
            rate = learning_rate(base, step, self._config, num_steps=self._num_steps)
            group["lr"] = rate
        return rate


def decay_kind(config: ScheduleConfig) -> str:
    """The kind of decay that a config stands for: `constant`, `warmup_polynomial` or `cosine`."""
    return config.name or ("warmup_polynomial" if config.decay_steps else "constant")


def learning_rate(base: float, step: int, config: ScheduleConfig, *, num_steps: int) -> float:
    """The rate of a step; `warmup_polynomial` is the policy of facebookresearch/dlrm as it was meant.

    Upstream's code never quite reaches the base rate after its warm-up, and crashes when it decays without one.

    Args:
        base: the base rate.
        step: from 1.
        config: kind, warm-up steps W, decay start D (at least W), decay steps N.
        num_steps: the run's last step, where decay ends when N is not set.

    Returns:
        base * step / W while step <= W; base until D; then with x = (step - D) / N, at most 1, base * (1 - x)^2 or
        base * (1 + cos(pi x)) / 2, not below 1e-7.
    """
    if step <= config.warmup_steps:
        return base * step / config.warmup_steps
    start = max(config.decay_start_step, config.warmup_steps)
    decay_steps = num_steps - start if config.decay_steps is None else config.decay_steps
    kind = decay_kind(config)
    if kind == "constant" or decay_steps <= 0 or step <= start:
        return base
    done = min(1.0, (step - start) / decay_steps)
    left = (1 - done) ** 2 if kind == "warmup_polynomial" else (1 + math.cos(math.pi * done)) / 2
    return max(MIN_LEARNING_RATE, base * left)
