"""Finds out where a bundle's symbolic link leads, and by which deltas one gets there from the bundle that is served.

Next to a bundle `0007` may lie `0007.delta`, which leads to it from another one; the deltas of a folder make chains.  A
link may also lead to a delta itself.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torchdlrm.bundle.delta import DELTA_NAME, DeltaManifest
from torchdlrm.bundle.manifest import MANIFEST_NAME
from torchdlrm.errors import BundleError
from torchdlrm.files import sha256_of
from torchdlrm.storage import mirror

_SUFFIX = ".delta"
_PATIENCE_S = 3.0  # of a look that is repeated anyway


@dataclass(frozen=True)
class Target:
    """Where a path leads.

    Attributes:
        path: the folder, without links.
        files: inode and time of the manifests of the bundle and of the deltas there, None where there is none: one that
            is copied again is another file.
    """

    path: Path
    files: tuple[tuple[int, int] | None, ...]

    @classmethod
    def of(cls, path: Path, seen: Self | None = None) -> Self:
        """Where a path leads now, to itself where links lead in a circle; `seen` where that is where it leads."""
        mirror.fetch_link(path, patience_s=None if seen is None else _PATIENCE_S)
        try:
            folder = path.resolve()
        except (OSError, RuntimeError):
            folder = path.absolute()
        if seen is not None and folder == seen.path:
            return seen
        mirror.fetch(folder if folder == path.absolute() else folder.parent, [f"*{MANIFEST_NAME}", f"*{DELTA_NAME}"])
        names = (folder / MANIFEST_NAME, folder / DELTA_NAME, _own_delta(folder) / DELTA_NAME)
        return cls(folder, tuple(map(_identity, names)))

    @property
    def has_bundle(self) -> bool:
        """Whether there is a whole bundle."""
        return self.files[0] is not None

    @property
    def has_delta(self) -> bool:
        """Whether there is a delta, or one next to it."""
        return self.files[1:] != (None, None)


def deltas_to(target: Target, served_sha256: str) -> list[Path]:
    """The deltas that lead to a target from what is served, in the order in which they apply; none where none do.

    Args:
        target: a bundle with a delta next to it, or a delta.
        served_sha256: of the manifest of the bundle that is served.

    Raises:
        BundleError: the delta to the target is damaged.
    """
    if not target.has_delta:
        return []
    last = _own_delta(target.path) if target.files[1] is None else target.path
    manifest = DeltaManifest.read(last)
    bundle = target.path / MANIFEST_NAME
    if target.has_bundle and sha256_of(bundle) != manifest.result.manifest_sha256:
        return []  # it was made of another bundle of that name
    chain, base = [last], manifest.base.manifest_sha256
    if base == served_sha256:
        return chain
    leading_to = {}
    for folder in sorted(last.parent.glob(f"*{_SUFFIX}")):
        try:
            found = DeltaManifest.read(folder)
        except BundleError:
            continue  # of no use here
        leading_to[found.result.manifest_sha256] = (folder, found.base.manifest_sha256)
    while base != served_sha256:
        step = leading_to.pop(base, None)  # once, for damaged ones may lead in a circle
        if step is None:
            return []
        chain.insert(0, step[0])
        base = step[1]
    return chain


def first_bundle(target: Target) -> Target:
    """The bundle that a server begins with: the target, or where that is a delta, one next to it that deltas lead from.

    Raises:
        BundleError: the delta to the target is damaged.
    """
    if target.has_bundle or not target.has_delta:
        return target
    for folder in sorted(target.path.parent.iterdir(), reverse=True):  # the last one needs the fewest deltas
        manifest = folder / MANIFEST_NAME
        if manifest.is_file() and deltas_to(target, sha256_of(manifest)):
            return Target.of(folder)
    return target


def _own_delta(folder: Path) -> Path:
    return folder.parent / f"{folder.name}{_SUFFIX}"  # of the root, too, which has no name


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns
