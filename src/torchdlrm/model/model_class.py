"""Loads a model of a user's own, and identifies it, so that a run or bundle knows that it is the same one.

In: the class, or on the command line `my_models.py:GatedSum`: of an interaction arch, or of a whole model.  Out: an
`Architecture` like any other, whose products are found by running it and which its own forward serves.

A run and a bundle record a name and the checksum of a file, and no code.  The class is given again to open them.

F sparse features, D embedding dimension.
"""

import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from pydantic import ValidationError
from torch import nn

from torchdlrm.config import ModelConfig
from torchdlrm.config.model import Setting
from torchdlrm.errors import ConfigError, TorchDLRMError
from torchdlrm.features.tables import Feature, Table
from torchdlrm.files import sha256_of
from torchdlrm.model.architecture import Architecture, ModelShape, Product, built_in
from torchdlrm.records import Record
from torchdlrm.toml import did_you_mean

if TYPE_CHECKING:
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

# What makes a model or an interaction arch; or where it stands, as `my_models.py:GatedSum` or `my.models:GatedSum`.
ModelClass = Callable[..., nn.Module] | str
_MODEL_ARGUMENTS = (
    *("embedding_bag_collection", "dense_in_features", "dense_arch_layer_sizes", "over_arch_layer_sizes"),
    "dense_device",
)
_INTERACTION_ARGUMENTS = ("num_sparse_features", "embedding_dim")
_OF_ONE_PROCESS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class ModelClassRecord(Record):
    """What identifies a model class.

    Attributes:
        name: `FILE:NAME`, the file without its folder.
        sha256: of the file; None where there is none, as for what was typed into an interpreter.
    """

    name: str
    sha256: str | None


@dataclass(frozen=True)
class CustomArchitecture(Architecture):
    """A model class of the user's.

    Attributes:
        make: takes what `torchrec.models.dlrm.DLRM` takes, by name, and gives a module that maps dense features and a
            KJT to logits [B, L] and holds the tables as `sparse_arch.embedding_bag_collection`; or makes an interaction
            arch.
        record: what identifies it.
        is_interaction: whether it is the latter: takes `num_sparse_features` and `embedding_dim`, and gives a module
            with an `output_size` whose forward maps [B, D] and [B, F, D] to [B, output_size].
        may_have_changed: whether its file may be another one than a run or bundle says.
        settings: its own, as the config has them, and its defaults; passed by name.
    """

    make: Callable[..., nn.Module]
    record: ModelClassRecord
    is_interaction: bool
    may_have_changed: bool
    settings: tuple[tuple[str, Setting], ...] = ()

    def _own_arguments(self, shape: ModelShape) -> dict[str, Any]:
        """What it is given besides what its like are: its settings, and features and labels where it takes them."""
        there, takes = {"features": shape.features, "labels": shape.labels}, inspect.signature(self.make).parameters
        return {**dict(self.settings), **{name: value for name, value in there.items() if name in takes}}

    def build(
        self, shape: ModelShape, embedding_bag_collection: "EmbeddingBagCollection", device: torch.device
    ) -> nn.Module:
        """What the class makes; of an interaction arch, a DLRM with it.

        Raises:
            ConfigError: it fails, or makes something else than a model, or one that cannot be trained on several
                processes or exported.
        """
        from torchrec.modules.embedding_modules import (  # noqa: PLC0415 - as for `DLRM` below
            EmbeddingBagCollection,
            EmbeddingCollection,
        )

        taken = inspect.signature(self.make).parameters.values()
        if shape.content and not self.is_interaction and not any(p.name == "content" or p.kind == 4 for p in taken):
            self._refuse("takes no `content`, and the dataset has vectors (docs/models.md)")
        own, how = self._own_arguments(shape), {**shape.arguments, "dense_device": device}
        with _reported(self.record.name):
            model: Any = (
                self._dlrm_of_interaction(own, embedding_bag_collection=embedding_bag_collection, **how)
                if self.is_interaction
                else self.make(embedding_bag_collection=embedding_bag_collection, **how, **own)
            )
        self._require_module(model)
        held = getattr(getattr(model, "sparse_arch", None), "embedding_bag_collection", None)
        if held is not embedding_bag_collection:
            how_held = "sparse_arch.embedding_bag_collection, as torchdlrm.SparseArch does"
            self._refuse(f"must hold the tables that it is given as {how_held}")
        for name, module in model.named_modules():
            if isinstance(module, _OF_ONE_PROCESS):
                why = "whose statistics would be those of one process's rows; take torchdlrm.GlobalBatchNorm1d"
                self._refuse(f"is a torch.nn.{type(module).__name__}, {why}", of=name)
            if isinstance(module, (EmbeddingBagCollection, EmbeddingCollection)) and module is not held:
                why = "the tables are those that it is given; a class method `tables` asks for others (docs/models.md)"
                self._refuse(f"is another {type(module).__name__}; {why}", of=name)
        for name, value in model.state_dict().items():
            if value.dtype != torch.float32:
                why = "must be float32, or registered with persistent=False, and so in no checkpoint and no bundle"
                self._refuse(f"is {value.dtype}; weights and buffers {why}", of=name)
        return model

    def _dlrm_of_interaction(self, own: Mapping[str, Any], **arguments: Any) -> nn.Module:
        from torchdlrm.model.dlrm import DLRM  # noqa: PLC0415 - with TorchRec, which a server can do without

        make_checked = self._checked_interaction

        class DLRMOfInteraction(DLRM):
            def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
                return make_checked(num_sparse_features, embedding_dim, own)

        return DLRMOfInteraction(**arguments)

    def _checked_interaction(
        self, num_sparse_features: int, embedding_dim: int, own: Mapping[str, Any]
    ) -> tuple[nn.Module, int]:
        """The interaction arch and its output size, once it has been seen to give such outputs of rows of zeros."""
        interaction = self.make(num_sparse_features=num_sparse_features, embedding_dim=embedding_dim, **own)
        self._require_module(interaction)
        size: Any = getattr(interaction, "output_size", None)
        if not isinstance(size, int) or size < 1:
            self._refuse(f"must have an output_size, how many numbers it gives, got {size}")
        if "sequences" in inspect.signature(interaction.forward).parameters:
            return interaction, size
        dense, sparse = torch.zeros(2, embedding_dim), torch.zeros(2, num_sparse_features, embedding_dim)
        with torch.no_grad():
            found: Any = interaction.eval()(dense_features=dense, sparse_features=sparse)
        interaction.train()
        if shape_of(found) != [2, size]:
            to = f"[2, {size}], as its output_size says, got {shape_of(found)}"
            self._refuse(f"must map {[*dense.shape]} and {[*sparse.shape]} to {to}", of="the forward")
        return interaction, size

    def _require_module(self, made: Any) -> None:
        if not isinstance(made, nn.Module):
            self._refuse(f"makes a {type(made).__name__}, which is no torch.nn.Module")

    def _refuse(self, why: str, of: str = "") -> NoReturn:
        raise ConfigError(f"`model_class`: {of and f'{of} of '}{self.record.name} {why}")

    def tables(self, features: Sequence[Feature]) -> Sequence[Table]:
        """What its class method `tables` asks for; raises ConfigError where that cannot be."""
        with _reported(self.record.name):
            found = tuple(getattr(self.make, "tables", lambda *_, **__: ())(features, **dict(self.settings)))
        if wrong := [table for table in found if not isinstance(table, Table)]:
            self._refuse(f"must give torchdlrm.Tables, and has {wrong[0]!r}", of="`tables`")
        if found and self.is_interaction:
            self._refuse("asks for tables, which no interaction arch is given; subclass DLRM")
        return found

    def products(self, shape: ModelShape) -> Sequence[Product]:
        """Found by running the model once on a few rows."""
        from torchdlrm.model.eager import trace_products  # noqa: PLC0415 - with TorchRec, which a server can do without

        with _reported(self.record.name):
            return trace_products(shape)

    def check(self, shape: ModelShape) -> None:
        """A step on a few rows, and one of padding.

        Raises:
            ConfigError: it fails, or padding makes gradients infinite.
        """
        from torchdlrm.model.eager import take_step  # noqa: PLC0415 - with TorchRec, which a server can do without

        with _reported(self.record.name):
            take_step(shape)


def shape_of(value: object) -> list[int] | str:
    """The shape of a tensor, and of anything else the name of its type: for messages."""
    return [*value.shape] if isinstance(value, torch.Tensor) else type(value).__name__


def reported(architecture: Architecture) -> AbstractContextManager[None]:
    """Report what fails inside in the file of a model class as a mistake in it, with its line."""
    record = record_of(architecture)
    return nullcontext() if record is None else _reported(record.name, only_its_lines=True)


@contextmanager
def _reported(name: str, *, only_its_lines: bool = False) -> Iterator[None]:
    """Report what fails inside as a mistake in the user's file, which is input, with its line.

    Args:
        name: of the file, or `FILE:NAME`.
        only_its_lines: raise what fails elsewhere as it is.
    """
    try:
        yield
    except (TorchDLRMError, ImportError, OSError):  # they say by themselves what is missing
        raise
    except Exception as error:
        file = Path(name.partition(":")[0]).name
        calls = [*traceback.format_tb(error.__traceback__), *getattr(error, "__notes__", ())]
        lines = re.findall(rf'\b{re.escape(file)}", line (\d+)', "".join(calls))
        if only_its_lines and not lines:
            raise
        where = f" (line {lines[-1]})" if lines else ""
        msg = f"`model_class`: {name} fails{where}: {type(error).__name__}: {error}"
        raise ConfigError(msg) from error


def architecture_of(
    config: ModelConfig, model_class: ModelClass | None = None, *, may_have_changed: bool = False
) -> Architecture:
    """The architecture that a model class stands for; where there is none, that of `model.interaction`.

    Args:
        config: of the model.
        model_class: a class or function; or where it stands: `FILE.py:NAME` or `MODULE:NAME`, which is imported.
        may_have_changed: whether a run or bundle of it can be opened though its file was another one then.

    Raises:
        ConfigError: there is no such class, it has no name by which it could be found again, it takes other arguments
            than a model or an interaction arch, or `model.interaction` is set too.
    """
    if model_class is None:
        if config.settings:
            msg = f"model.settings: only a model class of its own reads them (`model_class`), got {config.settings}"
            raise ConfigError(msg)
        return built_in(config.interaction)
    if config.interaction != "dot":
        msg = (
            f"model.interaction: is {config.interaction}, but a model class of its own (`model_class`) decides what "
            "its vectors do; leave one of the two out"
        )
        raise ConfigError(msg)
    make = _load(model_class) if isinstance(model_class, str) else model_class
    name = getattr(make, "__qualname__", None)
    if not callable(make) or name is None or "<lambda>" in name:
        msg = f"`model_class`: {make!r} is no class or function with a name, by which a run could be opened again"
        raise ConfigError(msg)
    try:
        file = inspect.getsourcefile(make)
    except TypeError:
        file = None
    path = Path(file) if file is not None else None
    if path is None or not path.is_file():
        record = ModelClassRecord(name=f"{make.__module__}:{name}", sha256=None)
    else:
        record = ModelClassRecord(name=f"{path.name}:{name}", sha256=sha256_of(path))
    settings = _settings(make, record.name, config.settings)
    is_interaction = _is_interaction(make, record.name, settings)
    return CustomArchitecture(make, record, is_interaction, may_have_changed, tuple(settings.items()))


def _settings(make: Callable[..., nn.Module], name: str, given: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings of a model class: what its `settings` say, but for those that are given.

    Raises:
        ConfigError: it has no such setting, or a value is of another type than its default.
    """
    problems, own = [], getattr(make, "settings", {})
    try:
        defaults = ModelConfig(settings=own).settings
    except ValidationError as error:
        what = f"`settings` of {name} must be numbers, texts, switches or lists by name, got {own!r}"
        raise ConfigError(f"`model_class`: {what}") from error
    for key, value in given.items():
        if key not in defaults:
            there = f"; it has {', '.join(defaults)}" if defaults else ""
            hint = did_you_mean(key, defaults) or there
            problems.append(f"model.settings.{key}: {name} has no such setting in its `settings`{hint}")
        elif type(value) is not type(defaults[key]) and (type(value), type(defaults[key])) != (int, float):
            problems.append(f"model.settings.{key}: must be of the type of {defaults[key]!r}, got {value!r}")
    if problems:
        raise ConfigError("\n  ".join(["the config does not suit the model class:", *problems]))
    return {**defaults, **given}


def _is_interaction(make: Callable[..., nn.Module], name: str, settings: Collection[str]) -> bool:
    """Whether what it takes makes it an interaction arch, and not a whole model.

    Raises:
        ConfigError: it is neither.
    """
    signature = inspect.signature(make)
    own = [*settings, *({"features", "labels"} & signature.parameters.keys())]
    for arguments in (_MODEL_ARGUMENTS, _INTERACTION_ARGUMENTS):
        with suppress(TypeError):
            signature.bind(**dict.fromkeys([*arguments, *own]))
            return arguments == _INTERACTION_ARGUMENTS
    msg = (
        f"`model_class`: {name} takes {signature}: an interaction arch takes {', '.join(_INTERACTION_ARGUMENTS)}, and "
        f"a whole model {', '.join(_MODEL_ARGUMENTS)}"
        + (f"; both take what its `settings` name: {', '.join(settings)}" if settings else "")
    )
    raise ConfigError(msg)


def record_of(architecture: Architecture | None) -> ModelClassRecord | None:
    """What a run and a bundle say of it: nothing, where it is a built-in one."""
    return architecture.record if isinstance(architecture, CustomArchitecture) else None


def difference_from(
    recorded: ModelClassRecord | None, given: Architecture | None, kind: Literal["run", "bundle"]
) -> str | None:
    """Why a run or bundle cannot be opened with this architecture, and what to give; None where it can."""
    found = record_of(given)
    if found == recorded:
        return None
    if recorded is None:
        return f"`model_class`: the {kind} is of the DLRM itself, got {found.name if found else None}; leave it out"
    if found is None:
        return f"the {kind} is of a model class of its own: give `model_class` {recorded.name} with the same file"
    if found.name != recorded.name:
        return f"`model_class`: the {kind} is of {recorded.name}, got {found.name}"
    if isinstance(given, CustomArchitecture) and given.may_have_changed:
        return None
    return (
        f"`model_class`: {found.name} has changed since the {kind} was written: its file's sha256 is {found.sha256}, "
        f"and was {recorded.sha256}; give the file as it was, or `allow_changed_model_class` where the change does no "
        "harm"
    )


def _load(place: str) -> Any:
    file, separator, name = place.rpartition(":")
    if not separator or not file or not name:
        msg = f"`model_class`: {place!r} is not of the form my_models.py:GatedSum, or my_package.models:GatedSum"
        raise ConfigError(msg)
    try:
        with _reported(file):
            module: Any = _load_file(Path(file)) if file.endswith(".py") else importlib.import_module(file)
    except (ImportError, OSError) as error:
        msg = f"`model_class`: {file} cannot be imported: {error}"
        raise ConfigError(msg) from error
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        msg = f"`model_class`: there is no {name} in {file}{did_you_mean(name, vars(module))}"
        raise ConfigError(msg)
    return found


def _load_file(path: Path) -> ModuleType:
    """Import a file, as a script would be: files in the same folder can be imported by it."""
    resolved = path.resolve(strict=True)
    name = f"torchdlrm_model_class_{resolved.stem}"
    loaded, sha256 = sys.modules.get(name), sha256_of(resolved)
    if loaded is not None and (loaded.__file__, vars(loaded).get("__sha256__")) == (str(resolved), sha256):
        return loaded
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module)["__sha256__"] = sha256  # of what runs: a server may load the file again once it has changed
    sys.modules[name] = module
    sys.path.insert(0, str(resolved.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(resolved.parent))
    return module
