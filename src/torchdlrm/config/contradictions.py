"""Says which settings do not go together, as lines for a message: what each says, and what to do."""

from collections.abc import Iterator

from torchdlrm.config.optimizers import DENSE_OPTIMIZERS, TABLE_OPTIMIZERS
from torchdlrm.config.sections import Config, ScheduleConfig, StopConfig, TrainConfig
from torchdlrm.config.types import changed_settings


def contradictions(config: Config) -> Iterator[str]:
    """Keys that do not go together, each with its value and what to do."""
    model = config.model
    if model.dense_arch_layer_sizes[-1] != model.embedding_dim:
        yield (
            f"model.dense_arch_layer_sizes: ends with {model.dense_arch_layer_sizes[-1]}, but must end with "
            f"model.embedding_dim = {model.embedding_dim}"
        )
    if model.embedding_dim % 4:
        yield f"model.embedding_dim: must be a multiple of 4 (FBGEMM's rows), got {model.embedding_dim}"
    if model.over_arch_layer_sizes[-1] != 1:
        yield f"model.over_arch_layer_sizes: must end with 1, the logit, got {model.over_arch_layer_sizes[-1]}"
    yield from model.interaction_problems()
    yield from model.feature_problems()
    yield from _of_labels(config.train)
    if config.train.fresh_tables:
        yield from _of_fresh_tables(config)
    yield from (f"model.{problem}" for problem in model.heads.problems(config.train.label_names))
    yield from _of_schedule(config.schedule, config.stop)
    yield from _unread_settings(config)


def _of_labels(train: TrainConfig) -> Iterator[str]:
    labels, weights = train.label_names, train.loss_weights or ()
    if train.label is not None and train.labels is not None:
        yield f"train.label: is {train.label}, and train.labels is {', '.join(labels)}; set one of both"
    if len({*labels}) < len(labels):
        yield f"train.labels: names a label twice, got {', '.join(labels)}"
    if weights and len(labels) < 2:
        yield f"train.loss_weights: is for several labels, got {weights!r} with one; set train.labels"
    elif weights != "uncertainty" and (unknown := {*weights}.difference(labels)):
        names = ", ".join(sorted(unknown))
        yield f"train.loss_weights: {names} is not in train.labels, which are {', '.join(labels)}"


def _of_fresh_tables(config: Config) -> Iterator[str]:
    key = "train.fresh_tables"
    if config.train.epochs == 1:
        yield f"{key}: there is no epoch after the first; set train.epochs = 2, or leave it out"
    for other, how in (("freeze", "keeps"), ("init_tables", "gives")):
        if given := getattr(config.train, other):
            yield f"{key}: would change what train.{other} {how} ({', '.join(given)}); set one of both"
    if config.sharding.cache_fraction is not None:
        yield f"{key}: not where GPUs cache tables (sharding.cache_fraction); set one of both"


def _of_schedule(schedule: ScheduleConfig, stop: StopConfig) -> Iterator[str]:
    if schedule.decay_start_step and schedule.decay_start_step < schedule.warmup_steps:
        yield (
            f"schedule.decay_start_step: {schedule.decay_start_step} is before the end of the warm-up "
            f"(schedule.warmup_steps = {schedule.warmup_steps})"
        )
    if schedule.name in {"constant", "plateau"} and (schedule.decay_steps or schedule.decay_start_step):
        yield f"schedule.name: {schedule.name} has no decay, but decay_start_step or decay_steps is set"
    if schedule.name is None and schedule.decay_start_step and not schedule.decay_steps:
        yield "schedule.decay_start_step: is set, but neither schedule.name nor schedule.decay_steps"
    patience = schedule.plateau_patience_validations
    if schedule.name != "plateau":
        for leaf, value in changed_settings(schedule):
            if leaf.startswith("plateau_"):
                yield f"schedule.{leaf}: only schedule.name = plateau reads it, got {value!r}"
    elif stop.patience_validations is not None and stop.patience_validations <= patience:
        yield (
            f"stop.patience_validations: {stop.patience_validations} stops the run before plateau reduces the rate; "
            f"must be above schedule.plateau_patience_validations = {patience}"
        )


_OF_ALL_OPTIMIZERS = {"name", "learning_rate", "clip_norm"}


def _unread_settings(config: Config) -> Iterator[str]:
    """Settings that were changed although the chosen optimizer does not read them."""
    for section, chosen, read in (
        ("table_optimizer", config.table_optimizer, TABLE_OPTIMIZERS[config.table_optimizer.name].settings),
        ("dense_optimizer", config.dense_optimizer, DENSE_OPTIMIZERS[config.dense_optimizer.name].settings),
    ):
        for leaf, value in changed_settings(chosen):
            if leaf not in _OF_ALL_OPTIMIZERS | read:
                yield f"{section}.{leaf}: {section}.name = {chosen.name} has no such thing, got {value!r}"
    decay = config.warm_start.accumulator_decay
    if decay != 1 and not config.accumulators:
        yield f"warm_start.accumulator_decay: no optimizer is adagrad or rowwise_adagrad, got {decay}"
