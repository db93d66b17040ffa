"""Defines every exception that torchdlrm raises on purpose; `TorchDLRMError` catches them all.

    TorchDLRMError
    ├── UserError (ValueError)   the input is wrong; the command line prints it and exits with 2
    │   ├── SchemaError          a schema file or preset
    │   ├── ConfigError          a config file or an override of one of its keys
    │   ├── LogError             a raw log: a file, a line, a column
    │   ├── DatasetError         an encoded dataset on disk
    │   ├── PlanError            a sharding plan that does not exist, or does not fit
    │   │   └── DoesNotFitError  the tables are too large for the machine
    │   ├── RunError             a run on disk
    │   ├── BundleError          an exported model on disk
    │   ├── LiveError            a live model on disk
    │   ├── StorageError         a bucket, or an object in it
    │   └── RowError             a row to predict
    ├── TrainingError            training cannot continue (not the input's fault as far as we know)
    │   └── LostProcessError     another process of the training has died or does not answer
    ├── SkewError                two ways to predict the same rows do not agree
    └── Interrupted              a job was asked to stop, and has saved what it had

A `UserError` says in one message which key, file or line is wrong, which value it has and what to do about it. It names
arguments of the called function in backticks, as in "`max_rows`: must be at least 1, got 0"; the command line says the
option instead ("--max-rows: must be ..."), so no message outside `cli/` spells an option.
"""

import reprlib
from collections.abc import Mapping
from itertools import islice
from typing import Self

from torchdlrm.versions import how_to_get

_MAX_SHOWN_CHARACTERS = 80


class TorchDLRMError(Exception):
    """Root of all exceptions raised on purpose."""


class UserError(TorchDLRMError, ValueError):
    """What the user gave is wrong; the message names place, value and remedy.

    Attributes:
        is_everywhere: every process of a training raises it, so none waits for another and none must be started again.
    """

    is_everywhere = False

    def everywhere(self) -> Self:
        """The same error, once every process of a training raises it."""
        self.is_everywhere = True
        return self


class SchemaError(UserError):
    """A schema file or preset is wrong."""


class ConfigError(UserError):
    """A config file, or an override on the command line, is wrong; lists all problems at once."""


class LogError(UserError):
    """A raw log cannot be read as its schema says."""


class DatasetError(UserError):
    """A dataset on disk is missing, incomplete, damaged or of another format version."""


class PlanError(UserError):
    """No sharding plan fits the machine, or a given plan does not fit the model."""


class DoesNotFitError(PlanError):
    """The tables do not fit the machine; what is wrong is not how the question was asked."""


class RunError(UserError):
    """A run on disk is missing, incomplete or in use."""


class RowError(UserError):
    """A row to predict cannot be read as the model's schema says; names its number, its column and the value."""


class BundleError(UserError):
    """A bundle on disk is missing, damaged, of a newer format version, or predicts other than it should."""


class TrainingError(TorchDLRMError):
    """Training had to stop, for example because the loss is not finite."""


class LostProcessError(TrainingError):
    """Another process of the training has died or does not answer; starting again may help."""


class LiveError(UserError):
    """A live model on disk is missing, damaged or in use, or is asked for what it cannot do."""


class StorageError(UserError):
    """A bucket cannot be read or written, or a URL is wrong; names the bucket, the key and what to do."""


class SkewError(TorchDLRMError):
    """Training and serving, or two ways to serve, do not predict the same from the same rows."""


class Interrupted(TorchDLRMError):  # noqa: N818 - it is no error
    """A job was asked to stop (SIGTERM, Ctrl-C), has saved what it had, and can be started again."""


def missing_package(error: ModuleNotFoundError) -> ModuleNotFoundError | None:
    """The error in one sentence with the line to type, of a package that only some set-ups have; None of others."""
    remedy = how_to_get(error.name) if error.name is not None else None
    if remedy is None:
        return None
    return ModuleNotFoundError(f"{error.name} is not installed: {remedy}", name=error.name)


class _Short(reprlib.Repr):
    def repr_dict(self, x: dict[object, object], level: int) -> str:
        """As of other dicts, but without sorting all the keys of a large one."""
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)


_short = _Short()
_short.maxlevel, _short.maxstring = 2, _MAX_SHOWN_CHARACTERS


def shown(value: object) -> str:
    """A value as a message repeats it: as Python writes it, but short, whatever its size and however deep it is."""
    text = _short.repr(value[:_MAX_SHOWN_CHARACTERS] if isinstance(value, bytes) else value)
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else text[: _MAX_SHOWN_CHARACTERS - 3] + "..."


def differences(was: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """A line for each name whose value is another one now."""
    names = [name for name in dict.fromkeys([*was, *now]) if was.get(name) != now.get(name)]
    return [f"  {name}: was {shown(was.get(name))}, is {shown(now.get(name))}" for name in names]
