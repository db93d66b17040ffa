"""Says what a change of a run's config means: nothing, other weights from here on, or that it cannot be resumed."""

from collections.abc import Collection
from dataclasses import dataclass

from torchdlrm.config import Config, StopConfig, setting_values

# With another value of these, the saved weights, optimizer state or position mean something else.
_CANNOT_CHANGE = (
    *("seed", "model.", "train.batch_size_global", "train.label", "train.labels"),
    *("train.loss_weights", "train.loss_weights.", "train.init_tables", "train.init_tables."),
    *("table_optimizer.name", "table_optimizer.weight_decay_mode", "dense_optimizer.name"),
    *("train.freeze", "warm_start."),
)
# These lead to other weights from here on, so a run that is complete was not trained with another value.
_OF_WEIGHTS = (
    *("table_optimizer.", "dense_optimizer.", "schedule.", "stop.", "train.dropout", "train.negative_weight"),
    *("train.precision", "train.tf32", "train.communication", "train.fresh_tables"),
)
# Where a plateau or early stopping looks at validations, these do too.
_OF_VALIDATIONS = ("validation.every_steps", "validation.every_rows", "validation.max_rows")


@dataclass(frozen=True)
class Change:
    """A key of the config that differs between the start of a run and now."""

    key: str
    before: object
    now: object

    @property
    def is_fatal(self) -> bool:
        """Whether the run cannot be resumed with it."""
        return self._is_of(_CANNOT_CHANGE)

    def is_too_late(self, config: Config) -> bool:
        """Whether a complete run would have other weights with it; `config` is that of now."""
        looks = config.schedule.kind == "plateau" or config.stop != StopConfig()
        return not self.is_fatal and self._is_of((*_OF_WEIGHTS, *(_OF_VALIDATIONS if looks else ())))

    def __str__(self) -> str:
        return f"{self.key}: was {shown(self.before)}, is {shown(self.now)}"

    def _is_of(self, names: Collection[str]) -> bool:
        """Whether its key is one of these, or in a section that ends with a dot."""
        return any(self.key == name or (name.endswith(".") and self.key.startswith(name)) for name in names)


def changes_between(before: Config, now: Config) -> list[Change]:
    """The settings that are others now."""
    was, is_now = setting_values(before), setting_values(now)
    names = dict.fromkeys((*is_now, *was))  # those of features are there if they are set
    return [Change(name, was.get(name), is_now.get(name)) for name in names if was.get(name) != is_now.get(name)]


def shown(value: object) -> object:
    """A setting's value as messages show it."""
    return "not set" if value is None else list(value) if isinstance(value, tuple) else value
