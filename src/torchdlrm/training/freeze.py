"""Finds the parts of a model that `train.freeze` names, and keeps training from changing them by a bit.

Frozen parameters get no gradient, so that no optimizer steps on them, decays them or touches their state; frozen
modules stay in evaluation mode, so that no running statistics move and nothing is dropped.  Frozen tables are left out
of the update in the backward of their lookup (`tables/lookup.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchdlrm.errors import ConfigError
from torchdlrm.features.tables import FeatureTable
from torchdlrm.toml import did_you_mean

_TABLES, _DENSE = "tables", "dense"
_COLLECTION = "sparse_arch.embedding_bag_collection"


@dataclass(frozen=True)
class FrozenParts:
    """What does not change.

    Attributes:
        tables: by name.
        modules: of the model but the tables, by name.
        parameters: of the model but the tables, by name.
    """

    tables: frozenset[str]
    modules: frozenset[str]
    parameters: frozenset[str]

    def freeze_parameters(self, model: nn.Module) -> bool:
        """Let no gradient reach them in a model that is not sharded yet; whether any other but a table still learns."""
        dense = {name: value for name, value in model.named_parameters() if not _is_inside(name, _COLLECTION)}
        for name in self.parameters:
            dense[name].requires_grad = False
        return any(value.requires_grad for value in dense.values())

    def keep_in_evaluation(self, model: nn.Module) -> None:
        """Let `model.train()` pass the modules over; `model` may be sharded inside."""
        for name in self.modules:
            _keep_in_evaluation(model.get_submodule(name))


def _keep_in_evaluation(module: nn.Module) -> None:
    def stay(mode: Any = None) -> nn.Module:  # noqa: ARG001 - as torch calls it
        return module

    module.eval()
    module.train = stay  # type: ignore[method-assign]


def frozen_parts(names: Sequence[str], model: nn.Module, tables: Sequence[FeatureTable]) -> FrozenParts:
    """What the names stand for.

    Args:
        names: `tables`, `dense`, sparse features, or modules of the model.
        model: that holds the tables as `sparse_arch.embedding_bag_collection`; may be on the meta device.
        tables: of all features.

    Raises:
        ConfigError: there is no part of a name, or nothing is left to learn.
    """
    modules = [name for name, _ in model.named_modules() if name and not _is_inside(name, _COLLECTION)]
    parameters = [name for name, _ in model.named_parameters() if not _is_inside(name, _COLLECTION)]
    features = list(dict.fromkeys(table.feature for table in tables))
    frozen_tables = {table.name for table in tables if table.asked is not None and table.asked.frozen}
    prefixes: set[str] = set()
    for name in names:
        if name == _DENSE:
            prefixes.update(parameters, modules)
        elif name == _TABLES or (name not in features and _is_inside(_COLLECTION, name)):
            frozen_tables.update(table.name for table in tables)
            prefixes.update({name} & {*modules})
        elif name in features:
            own = {table.name for table in tables if table.feature == name}
            frozen_tables |= own
            prefixes.update(f"sparse_arch.projections.{table}" for table in own)
        elif name in modules:
            prefixes.add(name)
        else:
            known = [_TABLES, _DENSE, *features, *modules]
            hint = did_you_mean(name, known) or f"; there are {', '.join(known[:6])}, ..."
            raise ConfigError(f"train.freeze: {name!r} is no feature and no module of the model{hint}")
    # Those that hold the tables are in training mode as long as any table learns.
    frozen = FrozenParts(
        frozenset(frozen_tables),
        frozenset(name for name in modules if not _is_inside(_COLLECTION, name) and _is_covered(name, prefixes)),
        frozenset(name for name in parameters if _is_covered(name, prefixes)),
    )
    if names and frozen.tables == {table.name for table in tables} and len(frozen.parameters) == len(parameters):
        raise ConfigError(f"train.freeze: {', '.join(names)}: nothing is left to learn; leave one out")
    return frozen


def _is_inside(name: str, module: str) -> bool:
    """Whether a name is that of the module, or of something in it."""
    return f"{name}.".startswith(f"{module}.")


def _is_covered(name: str, prefixes: set[str]) -> bool:
    return any(_is_inside(name, prefix) for prefix in prefixes)
