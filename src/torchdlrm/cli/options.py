"""Defines what commands have in common: types of options, config keys as options, and messages for mistakes.

The config knows its keys and types, not the parser: so a wrong key in a file and one on the command line are found by
the same code and reported by the same message. The parser's own messages name `--rows` where it was not typed, and
take a mistyped option for a value. The library's messages name arguments of functions; here they become options of the
command that was run.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Literal, Union, get_args, get_origin

from cyclopts import App, Argument, Parameter
from cyclopts.exceptions import CoercionError, CycloptsError, MissingArgumentError
from cyclopts.validators import Number
from pydantic import ValidationError

from torchdlrm.config import DeviceChoice
from torchdlrm.errors import ConfigError, UserError
from torchdlrm.toml import did_you_mean, explain

if TYPE_CHECKING:
    from torchdlrm.training.processes.launch import Processes

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True)]
Flag = Annotated[bool, Parameter(negative="")]
Positive = Annotated[int, Parameter(validator=Number(gte=1))]
NotNegative = Annotated[int, Parameter(validator=Number(gte=0))]
# `as_json: Json = False` is the last of a command's options.
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object on standard output.")]
TextFormat = Annotated[
    Literal["log", "csv", "tsv"],
    Parameter(
        name="--format",
        help="How text is written: as the model's schema says (log); with commas, quotes and a header (csv); with tabs "
        "(tsv).",
    ),
]


@Parameter(name="*")
@dataclass(frozen=True)
class OwnModel:
    """A model of the user's own: `vars` of it is what functions of the library take.

    Attributes:
        model_class: A model of your own in place of the DLRM, or its interaction arch: FILE.py:NAME or MODULE:NAME of a
            class or function (docs/models.md); to be given again to each command that uses its run or bundle.
        allow_changed_model_class: Take the model class though its file has changed since.
    """

    model_class: str | None = None
    allow_changed_model_class: Flag = False


@Parameter(name="*")
@dataclass(frozen=True)
class Judging:
    """Which predicted rows are judged, and how: `vars` of it is what functions of the library take.

    Attributes:
        split: Of the dataset of a run or a bundle: train, val or test; several joined by + are judged together, as in
            val+test.
        dataset: Where the dataset is now, if it has moved since the training.
        group: Column whose equal values depend on each other, as in user_id: intervals of groups, and GAUC.
        label: Of a run or a bundle: which of its labels, the first by default. Of a file: its column of labels, label
            by default.
        weight: Of a file: its column of weights; weight by default, where there is one.
        by: Slices to judge, worst first: columns and crossed ones, as in `'cat_5,int_2,cat_5*int_2'`.
        device: auto, cuda or cpu: where to compute (as train.device), whatever a run was trained on.
    """

    split: str = "test"
    dataset: Path | None = None
    group: str | None = None
    label: str | None = None
    weight: str | None = None
    by: str | None = None
    device: DeviceChoice = "auto"


@Parameter(name="*")
@dataclass(frozen=True)
class Machines:
    """Which processes of which machines do the work.

    Attributes:
        nproc_per_node: Processes on this machine: one for each GPU, or one for a few CPU cores.
        nnodes: Machines; start the same command on each, with the run on storage that they share.
        rdzv_endpoint: HOST:PORT of one of the machines, where they find each other; needed with --nnodes.
        rdzv_id: Name of the job, the same on all machines.

    Raises:
        ConfigError: there are several, and they do not know where to find each other.
    """

    nproc_per_node: Positive = 1
    nnodes: Positive = 1
    rdzv_endpoint: str = ""
    rdzv_id: str = "torchdlrm"

    def __post_init__(self) -> None:
        """See that several machines can find each other."""
        if self.nnodes > 1 and not self.rdzv_endpoint:
            msg = "--rdzv-endpoint: needed with --nnodes, HOST:PORT of one of the machines, the same on each"
            raise ConfigError(msg)

    def processes(self, max_restarts: int = 0) -> "Processes":
        """What `launch` takes."""
        from torchdlrm.training.processes.launch import Processes

        return Processes(**vars(self), max_restarts=max_restarts)


def split_config(tokens: tuple[str, ...]) -> tuple[str | None, dict[str, str]]:
    """The config's file or name, if the first token is one; and the text of the keys that the others override, by name.

    An optional positional of its own would leave the parser no place for `--train.epochs 2` without a config.

    Raises:
        ConfigError: a token is neither, nor part of `--name value` or `--name=value`.
    """
    left = list(tokens)
    config = left.pop(0) if left and not left[0].startswith("--") else None
    overrides: dict[str, str] = {}
    while left:
        token = left.pop(0)
        name, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not name:
            msg = f"{token!r}: expected --KEY VALUE; dlrm train --help lists the options, dlrm config the keys"
            raise ConfigError(msg)
        if not equals:
            if not left:
                raise ConfigError(f"{token}: needs a value")
            value = left.pop(0)
        overrides[name] = value
    return config, overrides


def refuse_mistyped(rows: Sequence[Path], command: str) -> None:
    """Refuse an option that does not exist: where files or `-` are read, the parser takes it for a file.

    Raises:
        UserError: one of `rows` looks like an option, and no file has that name.
    """
    for path in rows:
        if str(path).startswith("--") and not path.exists():
            raise UserError(f"{path}: there is no such option; dlrm {command} --help shows all options")


def describe_mistake(error: CycloptsError) -> str:
    """Which command, which argument or option, and what was perhaps meant."""
    error.verbose = False
    if isinstance(error.__cause__, ValidationError):
        items = error.__cause__.errors(include_url=False)
        return "\n".join(f"--{'.'.join(map(str, item['loc'])).replace('_', '-')}: {explain(item)}" for item in items)
    command = " ".join(["dlrm", *(error.command_chain or ())])
    argument = error.argument
    if isinstance(error, CoercionError) and error.token is not None and argument is not None:
        wanted = None if error.msg or error.__cause__ else _wanted(error.target_type, error.token.value)
        if wanted is not None:
            return f"{_name(argument)}: {wanted}"
    if not isinstance(error, MissingArgumentError) or argument is None or error.keyword or argument.tokens:
        return re.sub(r'^Command ".*?" parameter ', "", str(error))
    option = _name(argument)
    if not option.startswith("--"):
        return f"{command}: {option} is missing; {command} --help shows how it is called"
    typed = [token for token in error.root_input_tokens or () if token.startswith("--") and "." not in token]
    close = difflib.get_close_matches(option, typed, n=1, cutoff=0.7)
    hint = f"; did you mean it by {close[0]}?" if close else f"; {command} --help shows all options"
    return f"{command}: {option} is missing{hint}"


def _wanted(kind: object, value: str) -> str | None:
    """What a value must be, None where its type does not say it in words."""
    kinds = [kind]
    while nested := [part for part in kinds if get_origin(part) in {Literal, Union, UnionType}]:
        kinds = [part for outer in kinds for part in (get_args(outer) if outer in nested else (outer,))]
    choices = [choice for choice in kinds if isinstance(choice, str)]
    if choices:
        is_beginning = sum(choice.startswith(value) for choice in choices) > 1  # of several, none is nearer than others
        hint = "" if is_beginning else did_you_mean(value, choices)
        return f"must be one of {', '.join(choices)}, not {value!r}{hint}"
    number = "a whole number" if int in kinds else "a number" if float in kinds else None
    return number and f"must be {number}, got {value!r}"


def in_options(message: str, app: App, tokens: Sequence[str]) -> str:
    """A message of the library in which each argument in backticks has become an option of the command that was run.

    Args:
        message: as in "`max_rows`: must be at least 1"; names that are no argument of the command stay as they are.
        app: of all commands.
        tokens: the command line.
    """
    if "`" not in message:
        return message
    _, apps, _ = app.parse_commands(tokens)
    options = {argument.field_info.name: _name(argument) for argument in apps[-1].assemble_argument_collection()}
    return re.sub(r"`(\w+)`", lambda found: options.get(found[1], found[0]), message)


def _name(argument: Argument) -> str:
    """Return how the command line writes an argument: `--max-rows` for an option, `RUN` for a positional one."""
    is_positional = argument.index is not None and not argument.field_info.is_keyword_only
    return argument.name.removeprefix("--").upper() if is_positional else argument.name
