"""Tells the folders that torchdlrm writes from each other, and from everything else.

In: a path.  Out: what it is, or an error that says so and what to do. Nothing of it is read, so that a wrong path is
refused at once.
"""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from torchdlrm.errors import BundleError, DatasetError, LiveError, RunError, UserError
from torchdlrm.storage import mirror
from torchdlrm.toml import did_you_mean

KindName = Literal["delta", "dataset", "bundle", "live model", "run"]


@dataclass(frozen=True)
class Kind:
    """A kind of folder.

    Attributes:
        name: what people call it.
        marker: the file that such a folder has and no other.
        error: what is raised where one is needed and is not there.
        made_by: how one is made in a new folder.
    """

    name: KindName
    marker: str
    error: type[UserError]
    made_by: str


# A live model has a config like a run, so it is asked for first.
KINDS = (
    Kind("delta", "delta.json", BundleError, "dlrm export RUN --delta-to BUNDLE --out {}"),
    Kind("dataset", "dataset.json", DatasetError, "dlrm preprocess LOG --out {}"),
    Kind("bundle", "bundle.json", BundleError, "dlrm export RUN --out {}"),
    Kind("live model", "live.toml", LiveError, "dlrm advance {} LOG --config CONFIG --schema SCHEMA"),
    Kind("run", "environment.json", RunError, "dlrm train CONFIG --dataset DATASET --run {}"),
)
_KIND: dict[str, Kind] = {kind.name: kind for kind in KINDS}
# What is wanted, what was given -> what helps; `{}` is the path.
_HELP: dict[tuple[KindName, KindName], str] = {
    ("bundle", "run"): "`dlrm export {} --out BUNDLE` makes a bundle of it",
    ("bundle", "delta"): "`dlrm apply BASE {} --out BUNDLE` makes the one that this delta leads to",
    ("bundle", "live model"): "that of a live model is {}/current",
    (
        "bundle",
        "dataset",
    ): "`dlrm train CONFIG --dataset {} --run RUN` trains on it, and `dlrm export` goes on from there",
    ("run", "dataset"): "`dlrm train CONFIG --dataset {} --run RUN` makes a run of it",
    ("run", "bundle"): "give the run that it was exported from; `dlrm inspect {}` has its name",
    ("run", "live model"): "its runs are those in {}/days",
    ("dataset", "run"): "give the dataset that it was trained on; `dlrm inspect {}` has its path",
    ("dataset", "live model"): "its datasets are those in {}/days",
}


def kind_of(path: Path) -> Kind | None:
    """What is there: one of `KINDS`, or None for anything else."""
    mirror.fetch(path, [kind.marker for kind in KINDS])
    return next((kind for kind in KINDS if (path / kind.marker).exists()), None)


def found_in(path: Path) -> Kind:
    """What is there; raises UserError where it is nothing that a command wrote."""
    if (kind := kind_of(path)) is not None:
        return kind
    found = "is no folder that a `dlrm` command wrote" if path.is_dir() else "is not a folder"
    names = ", ".join(f"a {kind.name} (with {kind.marker})" for kind in KINDS)
    beside = [other.name for other in path.parent.iterdir() if kind_of(other)] if path.parent.is_dir() else ()
    raise UserError(f"{path}: {found}; give one of these: {names}{did_you_mean(path.name, beside)}")


def expect(wanted: KindName, *paths: Path | None) -> None:
    """See that each path, if it is given, leads to a folder of this kind; commands do so before torch is imported.

    Raises:
        UserError: of the class that belongs to the kind: one does not.
    """
    for path in paths:
        if path is not None and kind_of(path) != _KIND[wanted]:
            raise wrong_folder(path, wanted)


def wrong_folder(path: str | Path, wanted: KindName) -> UserError:
    """The error where a folder of this kind is wanted and is not there: what is there, and what to do.

    No advice would write to what is there.
    """
    path, kind = Path(path), _KIND[wanted]
    found, given = kind_of(path), quote(str(path))
    if found is not None and found != kind:
        remedy = _HELP.get((wanted, found.name), f"make one with `{kind.made_by.format(kind.name.upper())}`")
        return kind.error(f"{path}: is a {found.name}, not a {wanted}; {remedy.format(given)}")
    made, close = kind.made_by.format("FOLDER" if path.exists() else given), ""
    if path.is_dir():
        what = f"has no {kind.marker}, so it is no {wanted} or an incomplete one"
    elif path.exists():
        what = f"is a file, not the folder of a {wanted}"
        made = f"dlrm preprocess {given} --out DATASET" if wanted == "dataset" else made
    else:
        what = "is not a folder"
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        close = did_you_mean(path.name, [other.name for other in beside if kind_of(other) == kind])
    return kind.error(f"{path}: {what}; make one with `{made}`{close}")
