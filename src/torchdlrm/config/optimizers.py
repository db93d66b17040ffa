"""Describes each optimizer: which settings it reads, what state it keeps, where it runs. No torch in here.

A new optimizer is a name and a record here, and its step: for tables that of a row on CPU
(`torchdlrm.tables.updates`), since FBGEMM computes it on GPUs; for the dense parts how torch's class is made
(`torchdlrm.training.sharded`). All other code asks the record.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

TableOptimizerName = Literal[
    "rowwise_adagrad", "adagrad", "sgd", "adam", "partial_rowwise_adam", "lamb", "partial_rowwise_lamb"
]
DenseOptimizerName = Literal["adagrad", "sgd", "adamw"]
WeightDecayModeName = Literal["decoupled", "lazy", "l2"]

_DECAY = frozenset({"weight_decay", "weight_decay_mode"})
_ADAM_SETTINGS = frozenset({"eps", "beta1", "beta2", "weight_decay"})
_ALL_MODES: frozenset[WeightDecayModeName] = frozenset({"decoupled", "lazy", "l2"})
_NOT_LAZY: frozenset[WeightDecayModeName] = frozenset({"decoupled", "l2"})
_DECOUPLED: frozenset[WeightDecayModeName] = frozenset({"decoupled"})
_ROW_FOR_ALL = "one squared mean for a row in place of one for each value"


@dataclass(frozen=True)
class TableOptimizer:
    """An optimizer of the tables, which runs inside their backward: on GPUs FBGEMM's, on CPU ours.

    Attributes:
        name: in `table_optimizer.name`.
        fbgemm_name: of FBGEMM's `EmbOptimType`. LARS is none of them: FBGEMM gives its state no name, so it could not
            be saved.
        settings: of `table_optimizer`, those that it reads besides `name` and `learning_rate`.
        state_per_weight: float32 values of state for each weight, whatever the precision of the weights.
        state_per_row: the same for each row of a shard: a table that is cut by columns has several a row, and learns a
            little differently.
        decays_on_cpu: modes of weight decay that it has there. LAMB has no lazy one: its trust ratio scales the decay,
            too, so that what a row has missed depends on steps that never were.
        decays_on_gpu: those that FBGEMM has.
        momentum: whose momentum it has, `adam` or `lamb`; empty where it has none.
        trade: the explanation shown where it is proposed in place of one with more state.
        is_lazy: whether its rows catch up on the weight decay of steps that did not look them up.
        accumulator: the name of its state that only grows; empty where it has none.
        is_in_fbgemm_on_cpu: whether FBGEMM has it there too, without weight decay.
    """

    name: TableOptimizerName
    fbgemm_name: str
    settings: frozenset[str]
    state_per_weight: int = 0
    state_per_row: int = 0
    decays_on_cpu: frozenset[WeightDecayModeName] = _ALL_MODES
    decays_on_gpu: frozenset[WeightDecayModeName] = _DECOUPLED
    momentum: str = ""
    trade: str = ""
    is_lazy: bool = False
    accumulator: str = ""
    is_in_fbgemm_on_cpu: bool = False

    def leaner(self) -> "Iterator[TableOptimizer]":
        """Those with less state that could stand in for it, the most state first: none with another momentum."""
        others = [other.with_lazy_decay() if self.is_lazy else other for other in TABLE_OPTIMIZERS.values()]
        by_state = sorted(others, key=lambda other: (other.state_per_weight, other.state_per_row))
        for other in reversed(by_state):
            if other._state() < self._state() and other.momentum in {"", self.momentum}:
                yield other

    def decays(self, *, on_cpu: bool) -> frozenset[WeightDecayModeName]:
        """Modes of weight decay that it has on a kind of device."""
        return self.decays_on_cpu if on_cpu else self.decays_on_gpu

    def with_lazy_decay(self) -> "TableOptimizer":
        """The same with one more value a row: the last step that has looked it up."""
        return replace(self, state_per_row=self.state_per_row + 1, is_lazy=True)

    @property
    def states_are_per_row(self) -> tuple[bool, ...]:
        """Of each state, in FBGEMM's order, whether it is a value a row and not one a weight."""
        return (False,) * self.state_per_weight + (True,) * self.state_per_row

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
        state_per_weight: float32 values of state for each weight.
        accumulator: the name of its state that only grows; empty where it has none.
    """

    name: DenseOptimizerName
    torch_name: str
    settings: frozenset[str]
    state_per_weight: int = 1
    accumulator: str = ""


TABLE_OPTIMIZERS: Mapping[TableOptimizerName, TableOptimizer] = {
    record.name: record
    for record in (
        TableOptimizer(
            "rowwise_adagrad",
            "EXACT_ROWWISE_ADAGRAD",
            _DECAY | {"eps", "initial_accumulator"},
            state_per_row=1,
            decays_on_gpu=_NOT_LAZY,
            accumulator="momentum1",
            is_in_fbgemm_on_cpu=True,
            trade="one learning rate for a row instead of one for each value; usually as accurate for tables",
        ),
        TableOptimizer(
            "adagrad",
            "EXACT_ADAGRAD",
            _DECAY | {"eps", "initial_accumulator"},
            state_per_weight=1,
            decays_on_gpu=frozenset(),
            accumulator="momentum1",
            is_in_fbgemm_on_cpu=True,
            trade="half of Adam's state; no momentum",
        ),
        TableOptimizer(
            "sgd",
            "EXACT_SGD",
            _DECAY,
            decays_on_gpu=frozenset(),
            is_in_fbgemm_on_cpu=True,
            trade="no state; rare ids learn slowly, so expect a lower AUC or a longer training",
        ),
        TableOptimizer("adam", "ADAM", _DECAY | _ADAM_SETTINGS, state_per_weight=2, momentum="adam"),
        TableOptimizer(
            "partial_rowwise_adam",
            "PARTIAL_ROWWISE_ADAM",
            _DECAY | _ADAM_SETTINGS,
            state_per_weight=1,
            state_per_row=1,
            momentum="adam",
            trade=_ROW_FOR_ALL,
        ),
        TableOptimizer(
            "lamb",
            "LAMB",
            _DECAY | _ADAM_SETTINGS,
            state_per_weight=2,
            decays_on_cpu=_NOT_LAZY,
            momentum="lamb",
        ),
        TableOptimizer(
            "partial_rowwise_lamb",
            "PARTIAL_ROWWISE_LAMB",
            _DECAY | _ADAM_SETTINGS,
            state_per_weight=1,
            state_per_row=1,
            decays_on_cpu=_NOT_LAZY,
            momentum="lamb",
            trade=_ROW_FOR_ALL,
        ),
    )
}

DENSE_OPTIMIZERS: Mapping[DenseOptimizerName, DenseOptimizer] = {
    record.name: record
    for record in (
        DenseOptimizer(
            "adagrad", "Adagrad", frozenset({"eps", "weight_decay", "initial_accumulator"}), accumulator="sum"
        ),
        DenseOptimizer("sgd", "SGD", frozenset({"momentum", "weight_decay"})),
        DenseOptimizer("adamw", "AdamW", _ADAM_SETTINGS, state_per_weight=2),
    )
}
