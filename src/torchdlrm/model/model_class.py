"""Loads a model of a user's own, and identifies it, so that a run or bundle knows that it is the same one.

In: the class, or on the command line `my_models.py:GatedDLRM`.  Out: an `Architecture` like any other, whose products
are found by running it and which its own forward serves.

A run and a bundle record a name and the checksum of a file, and no code.  Whoever opens them gives the class again.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from torchdlrm.config import ModelConfig
from torchdlrm.errors import ConfigError
from torchdlrm.files import sha256_of
from torchdlrm.model.architecture import ARCHITECTURES, Architecture, ModelShape, Product

if TYPE_CHECKING:
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

# What makes a model; or where it stands, as `my_models.py:GatedDLRM` or `package.module:GatedDLRM`.
ModelClass = Callable[..., nn.Module] | str


class ModelClassRecord(BaseModel):
    """By what a model class is known again.

    Attributes:
        name: `FILE:NAME`, the file without its folder.
        sha256: of the file; None where there is none, as for what was typed into an interpreter.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sha256: str | None


@dataclass(frozen=True)
class CustomArchitecture(Architecture):
    """A model class of somebody's own.

    Attributes:
        make: takes what `torchrec.models.dlrm.DLRM` takes, by name, and gives a module that maps dense features and a
            KJT to logits [B, 1] and holds the tables as `sparse_arch.embedding_bag_collection`.
        record: by what it is known again.
    """

    make: Callable[..., nn.Module]
    record: ModelClassRecord

    def build(
        self, shape: ModelShape, embedding_bag_collection: "EmbeddingBagCollection", device: torch.device
    ) -> nn.Module:
        """What the class makes.

        Raises:
            ConfigError: it makes something else than a model.
        """
        model: Any = self.make(
            embedding_bag_collection=embedding_bag_collection, **shape.arguments, dense_device=device
        )
        if not isinstance(model, nn.Module):
            msg = f"`model_class`: {self.record.name} makes a {type(model).__name__}, which is no torch.nn.Module"
            raise ConfigError(msg)
        held = getattr(getattr(model, "sparse_arch", None), "embedding_bag_collection", None)
        if held is not embedding_bag_collection:
            msg = (
                f"`model_class`: {self.record.name} must hold the tables that it is given as "
                "sparse_arch.embedding_bag_collection, as torchdlrm.model.dlrm.SparseArch does"
            )
            raise ConfigError(msg)
        return model

    def products(self, shape: ModelShape) -> Sequence[Product]:
        """Found by running the model once on a few rows."""
        from torchdlrm.model.eager import trace_products  # noqa: PLC0415 - with TorchRec, which a server can do without

        return trace_products(shape)


def architecture_of(config: ModelConfig, model_class: ModelClass | None = None) -> Architecture:
    """The architecture that a model class stands for; where there is none, that of `model.interaction`.

    Args:
        config: of the model.
        model_class: a class or function; or where it stands: `FILE.py:NAME` or `MODULE:NAME`, which is imported.

    Raises:
        ConfigError: there is no such class, it has no name by which it could be found again, or `model.interaction` is
            set too.
    """
    if model_class is None:
        return ARCHITECTURES[config.interaction]
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
        return CustomArchitecture(make, ModelClassRecord(name=f"{make.__module__}:{name}", sha256=None))
    return CustomArchitecture(make, ModelClassRecord(name=f"{path.name}:{name}", sha256=sha256_of(path)))


def record_of(architecture: Architecture | None) -> ModelClassRecord | None:
    """What a run and a bundle say of it: nothing, where it is not somebody's own."""
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
    return (
        f"`model_class`: {found.name} has changed since the {kind} was written: its file's sha256 is {found.sha256}, "
        f"and was {recorded.sha256}; give the file as it was"
    )


def _load(place: str) -> Any:
    file, separator, name = place.rpartition(":")
    if not separator or not file or not name:
        msg = f"`model_class`: {place!r} is not of the form my_models.py:GatedDLRM, or my_package.models:GatedDLRM"
        raise ConfigError(msg)
    try:
        found: Any = _load_file(Path(file)) if file.endswith(".py") else importlib.import_module(file)
    except (ImportError, OSError) as error:
        msg = f"`model_class`: {file} cannot be imported: {error}"
        raise ConfigError(msg) from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        known = f"`model_class`: there is no {name} in {file}"
        raise ConfigError(known)
    return found


def _load_file(path: Path) -> ModuleType:
    """Import a file, as a script would be: files in the same folder can be imported by it."""
    resolved = path.resolve(strict=True)
    name = f"torchdlrm_model_class_{resolved.stem}"
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ == str(resolved):
        return loaded
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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
