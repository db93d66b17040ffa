"""Checks what no single key of a config can show."""

from torchdlrm.config.optimizers import DENSE_OPTIMIZERS, TABLE_OPTIMIZERS
from torchdlrm.config.sections import Config, ScheduleConfig


def cross_checks(config: Config) -> list[str]:
    """Keys that do not go together, each with its value and what to do."""
    model = config.model
    found = []
    if model.dense_arch_layer_sizes[-1] != model.embedding_dim:
        found.append(
            f"model.dense_arch_layer_sizes: ends with {model.dense_arch_layer_sizes[-1]}, but must end with "
            f"model.embedding_dim = {model.embedding_dim}"
        )
    if model.embedding_dim % 4:
        found.append(f"model.embedding_dim: must be a multiple of 4 (FBGEMM's rows), got {model.embedding_dim}")
    if model.over_arch_layer_sizes[-1] != 1:
        found.append(f"model.over_arch_layer_sizes: must end with 1, the logit, got {model.over_arch_layer_sizes[-1]}")
    return [*found, *_schedule_problems(config.schedule), *_unread_settings(config)]


def _schedule_problems(schedule: ScheduleConfig) -> list[str]:
    found = []
    if schedule.decay_start_step and schedule.decay_start_step < schedule.warmup_steps:
        found.append(
            f"schedule.decay_start_step: {schedule.decay_start_step} is before the end of the warm-up "
            f"(schedule.warmup_steps = {schedule.warmup_steps})"
        )
    if schedule.name == "constant" and (schedule.decay_steps or schedule.decay_start_step):
        found.append("schedule.name: constant has no decay, but decay_start_step or decay_steps is set")
    if schedule.name is None and schedule.decay_start_step and not schedule.decay_steps:
        found.append("schedule.decay_start_step: is set, but neither schedule.name nor schedule.decay_steps")
    return found


# Settings that are refused where the chosen optimizer does not read them. Not `eps`, which all but sgd read, so that a
# file that sets it may change to sgd and back.
_REFUSED_IF_UNREAD = ("beta1", "beta2", "momentum", "weight_decay", "initial_accumulator")


def _unread_settings(config: Config) -> list[str]:
    """Settings that were changed although the chosen optimizer does not read them."""
    found = []
    for section, chosen, read in (
        ("table_optimizer", config.table_optimizer, TABLE_OPTIMIZERS[config.table_optimizer.name].settings),
        ("dense_optimizer", config.dense_optimizer, DENSE_OPTIMIZERS[config.dense_optimizer.name].settings),
    ):
        for leaf, field in type(chosen).model_fields.items():
            value = getattr(chosen, leaf)
            if leaf in _REFUSED_IF_UNREAD and leaf not in read and value != field.default:
                found.append(f"{section}.{leaf}: {section}.name = {chosen.name} has no such thing, got {value!r}")
    return found
