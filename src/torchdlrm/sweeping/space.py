"""Reads the space of a sweep: which keys of a config may have which values, and how they are searched.

In: space.toml, and the config that every trial starts from.  Out: a `Space`, or one error that lists every problem.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError, field_validator

from torchdlrm.config import Config, load_config
from torchdlrm.config.types import NonNegativeInt, PositiveInt, Section
from torchdlrm.errors import ConfigError
from torchdlrm.metrics import BEST, metrics_in
from torchdlrm.toml import did_you_mean, explain

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution  # choices are JSON text
# With other values of these, trials are judged by other rows or labels, or differ by chance alone.
_OF_EVERY_TRIAL = {"seed", "train.label", "train.labels", "validation.max_rows"}


class SweepSettings(Section):
    """How a space is searched: the section [sweep] of its file, which docs/judging.md explains."""

    trials: PositiveInt = 20
    metric: str = BEST
    seed: NonNegativeInt = 0
    pruner: Literal["MedianPruner", "SuccessiveHalvingPruner", "HyperbandPruner", "NopPruner"] = "MedianPruner"
    finalists: NonNegativeInt = 3
    seeds: PositiveInt = 3

    @field_validator("metric")
    @classmethod
    def _is_validated(cls, name: str) -> str:
        if name not in (names := [metric.name for metric in metrics_in("log")]):
            raise ValueError(f"must be one of {', '.join(map(repr, names))}, not {name!r}{did_you_mean(name, names)}")
        return name


@dataclass(frozen=True)
class Space:
    """The keys of `config`, by dotted names, that a sweep gives other values, and how it searches them."""

    config: Config
    values: Mapping[str, Distribution]
    search: SweepSettings


def load_space(path: str | Path, config: Config) -> Space:
    """Read a space, and see that each of its values makes a config.

    Raises:
        ConfigError: the file cannot be read, or keys or values are wrong; every problem in one message.
    """
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"`space`: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    search, values, problems = SweepSettings(), dict[str, Distribution](), list[str]()
    try:
        search = SweepSettings.model_validate(raw.pop("sweep", {}))
    except ValidationError as error:
        known = SweepSettings.model_fields
        for name, item in ((str(item["loc"][0]), item) for item in error.errors(include_url=False)):
            what = explain(item) if name in known else f"there is no such key{did_you_mean(name, known)}"
            problems.append(f"sweep.{name}: {what}")
    for key, given in raw.items():
        try:
            values[key] = _distribution(given)
        except (TypeError, ValueError) as error:
            problems.append(f"{key}: {error}")
    problems += [f"{key}: is the same for all trials; leave it out" for key in _OF_EVERY_TRIAL & values.keys()]
    problems += [] if raw else ['names no key to search, as in "train.dropout" = { low = 0.0, high = 0.2 }']
    for key, one in values.items():
        ends = one.choices if isinstance(one, CategoricalDistribution) else (one.low, one.high)
        problems += [line for end in ends for line in _misfits(config, key, end)]
    if problems:
        raise ConfigError("\n  ".join([f"{path}: the space is wrong:", *dict.fromkeys(problems)]))
    return Space(config, values, search)


def with_params(config: Config, params: Mapping[str, Any]) -> Config:
    """A config with values as Optuna has them; one of a section is a table of some of its keys."""
    texts = dict[str, str]()
    for key, param in params.items():
        value = json.loads(param) if isinstance(param, str) else param
        parts = {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
        texts |= {name: part if isinstance(part, str) else json.dumps(part) for name, part in parts.items()}
    return load_config(config, texts)


def _distribution(given: Any) -> Distribution:
    names = set(given) if isinstance(given, dict) else set()
    if names == {"choices"}:
        return CategoricalDistribution([json.dumps(choice) for choice in given["choices"]])
    if not {"low", "high"} <= names <= {"low", "high", "step", "log"}:
        msg = f'needs "A.KEY" = {{ low, high }}, perhaps with step or log = true, or {{ choices = [...] }}, got {given}'
        raise ValueError(msg)
    is_whole = all(isinstance(given[name], int) for name in names - {"log"})
    return (IntDistribution if is_whole else FloatDistribution)(**given)


def _misfits(config: Config, key: str, param: Any) -> list[str]:
    """What is wrong with a config of this value."""
    try:
        with_params(config, {key: param})
    except ConfigError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        remedy = '; keys that go together are one choice: "model" = { choices = [{ KEY = VALUE, KEY = VALUE }, ...] }'
        return [line[2:] if line.startswith("--") else f"{key} = {param}: {line}{remedy}" for line in lines]
    return []
