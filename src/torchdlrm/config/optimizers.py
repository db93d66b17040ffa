"""Describes each optimizer: which settings it reads, what state it keeps, where it runs. No torch in here.

A new optimizer is a name and a record here, and its step: for tables the name that FBGEMM has for it
(`torchdlrm.tables.optimizers`) and its step on CPU (`torchdlrm.tables.updates`); for
the dense parts how torch's class is made (`torchdlrm.training.sharded`). All other code asks the record.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

TableOptimizerName = Literal[
    "rowwise_adagrad", "adagrad", "sgd", "adam", "partial_rowwise_adam", "lamb", "partial_rowwise_lamb"
]
DenseOptimizerName = Literal["adagrad", "sgd", "adamw"]

_ADAM_SETTINGS = frozenset({"eps", "beta1", "beta2", "weight_decay"})
_ROW_FOR_ALL = "one squared mean for a row in place of one for each value"


@dataclass(frozen=True)
class TableOptimizer:
    """An optimizer of the tables, which FBGEMM runs inside its backward.

    Attributes:
        name: in `table_optimizer.name`.
        settings: of `table_optimizer`, those that it reads besides `name` and `learning_rate`.
        state_per_weight: float32 values of state for each weight, whatever the precision of the weights.
        state_per_row: the same for each row of a shard: a table that is cut by columns has several a row, and learns a
            little differently.
        on_cpu: whether FBGEMM has a CPU kernel for it.
        decays_on_cpu: whether that kernel knows weight decay; FBGEMM's take the argument and ignore it.
        momentum: whose momentum it has, `adam` or `lamb`; empty where it has none.
        trade: the explanation shown where it is proposed in place of one with more state.
    """

    name: TableOptimizerName
    settings: frozenset[str]
    state_per_weight: int = 0
    state_per_row: int = 0
    on_cpu: bool = False
    decays_on_cpu: bool = False
    momentum: str = ""
    trade: str = ""

    def leaner(self) -> "Iterator[TableOptimizer]":
        """Those with less state that could stand in for it, the most state first: none with another momentum."""
        by_state = sorted(TABLE_OPTIMIZERS.values(), key=lambda other: (other.state_per_weight, other.state_per_row))
        for other in reversed(by_state):
            if other._state() < self._state() and other.momentum in {"", self.momentum}:
                yield other

    def _state(self) -> tuple[int, int]:
        """What is compared: values a row matter only where there are none a weight."""
        return self.state_per_weight, 0 if self.state_per_weight else self.state_per_row


@dataclass(frozen=True)
class DenseOptimizer:
    """An optimizer of the dense and over arch.

    Attributes:
        name: in `dense_optimizer.name`.
        torch_name: of its class in torch.optim.
        settings: of `dense_optimizer`, those that it reads besides `name`, `learning_rate` and `clip_norm`.
    """

    name: DenseOptimizerName
    torch_name: str
    settings: frozenset[str]


TABLE_OPTIMIZERS: Mapping[TableOptimizerName, TableOptimizer] = {
    record.name: record
    for record in (
        TableOptimizer(
            "rowwise_adagrad",
            frozenset({"eps", "weight_decay", "initial_accumulator"}),
            state_per_row=1,
            on_cpu=True,
            trade="one learning rate for a row instead of one for each value; usually as accurate for tables",
        ),
        TableOptimizer(
            "adagrad",
            frozenset({"eps", "initial_accumulator"}),
            state_per_weight=1,
            on_cpu=True,
            trade="half of Adam's state; no momentum",
        ),
        TableOptimizer(
            "sgd",
            frozenset(),
            on_cpu=True,
            trade="no state; rare ids learn slowly, so expect a lower AUC or a longer training",
        ),
        TableOptimizer("adam", _ADAM_SETTINGS, state_per_weight=2, momentum="adam"),
        TableOptimizer(
            "partial_rowwise_adam",
            _ADAM_SETTINGS,
            state_per_weight=1,
            state_per_row=1,
            momentum="adam",
            trade=_ROW_FOR_ALL,
        ),
        TableOptimizer("lamb", _ADAM_SETTINGS, state_per_weight=2, momentum="lamb"),
        TableOptimizer(
            "partial_rowwise_lamb",
            _ADAM_SETTINGS,
            state_per_weight=1,
            state_per_row=1,
            momentum="lamb",
            trade=_ROW_FOR_ALL,
        ),
    )
}

DENSE_OPTIMIZERS: Mapping[DenseOptimizerName, DenseOptimizer] = {
    record.name: record
    for record in (
        DenseOptimizer("adagrad", "Adagrad", frozenset({"eps", "weight_decay", "initial_accumulator"})),
        DenseOptimizer("sgd", "SGD", frozenset({"momentum", "weight_decay"})),
        DenseOptimizer("adamw", "AdamW", _ADAM_SETTINGS),
    )
}
