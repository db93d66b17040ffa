"""Keeps what is at a URL and its path in the cache the same: fetches, publishes, moves, removes.

    CACHE/s3/BUCKET/KEY           the object's bytes, or blocks of them while they are fetched (`.KEY.part`)
    CACHE/stamps/s3/BUCKET/KEY    which object they are: its tag and size, and when the file was written
    CACHE/locks/00 to ff          keep processes from fetching the same object: each is of all whose paths have its sum

Buckets have no links: an object `current` is one that says where it leads, and in the cache it is a symbolic link.

A file with the stamp of the object that is in the bucket is not fetched again.  The cache takes at most
`TORCHDLRM_CACHE_BYTES`: files that have not been used for longest go first, and those alone that the bucket has.
All functions take paths, and do nothing for one that stands for no URL.
"""

import fcntl
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from threading import Lock
from zlib import crc32

from torchdlrm.errors import StorageError
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.storage import objects
from torchdlrm.storage.objects import ObjectStat
from torchdlrm.storage.places import cache_folder, is_unfinished, located, published_url, url_of
from torchdlrm.storage.stamps import STAMPS_NAME, read_stamp, stamp_path, stamped, write_stamp
from torchdlrm.units import parse_bytes

LIMIT_VARIABLE = "TORCHDLRM_CACHE_BYTES"
LINK_NAME = "current"
_BLOCK_BYTES = 2 << 20
_AT_A_TIME = 8
_evicting = Lock()


def fetch(path: Path, names: Iterable[str] = ("*",), progress: ProgressListener = SILENT) -> Path:
    """Bring what is at a URL into the cache, as it is there now; gives the path, of a link that where it leads.

    Args:
        path: of an object, of a folder (a prefix), or of a link to one.
        names: patterns for the paths of files inside of a folder that are needed now (`*` also matches a `/`, and it
            alone an object itself). Of all others the folders are made, and files that are no longer in the bucket are
            removed.
        progress: receives the bytes, where some are fetched.

    Raises:
        StorageError: the bucket cannot be read.
    """
    url = published_url(path)
    if url is None:
        return path
    patterns, listed_ns = tuple(names), time.clock_gettime_ns(5)  # Linux's CLOCK_REALTIME_COARSE, as files have it
    found = objects.listed(url)
    if not found and path.name == LINK_NAME and fetch_link(path) is not None:
        return fetch(path.resolve(), patterns, progress)
    if not found:
        try:
            stat = objects.stat(url)
        except FileNotFoundError:
            _forget(path)
        else:
            if any(fnmatchcase("", pattern) for pattern in patterns):
                _fetch_files({path: stat}, progress)
        return path
    here = _prune(path, found, listed_ns)
    wanted = [name for name in found if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for folder in {path, *((path / name).parent for name in found.keys() - here)}:
        folder.mkdir(parents=True, exist_ok=True)
    stamps = stamp_path(path)
    for name in here.intersection(wanted):
        os.utime(f"{stamps}/{name}")  # used now
    _fetch_files({path / name: found[name] for name in wanted if name not in here}, progress)
    return path


def fetch_link(link: Path, *, patience_s: float | None = None) -> str | None:
    """Lead a link to where its object in the bucket says, by one request; gives the object's tag, if there is one.

    Raises:
        StorageError: the bucket cannot be read within this time, or the object is no link.
    """
    url = published_url(link)
    if url is None or link.name != LINK_NAME or (link.is_dir() and not link.is_symlink()):
        return None
    known = stamped(link)
    etag = None if known is None else known.etag
    try:
        found = objects.read_if_changed(url, etag, patience_s=patience_s)
    except FileNotFoundError:
        _forget(link)
        return None
    if found is None:
        return etag
    target = found[0].decode(errors="replace")
    if re.fullmatch(r"(?!current\b)\w[\w.-]*(/(?!current\b)\w[\w.-]*)*", target) is None:
        msg = f"{url}: is no link: its content is no place, as bundles/0002 is; `dlrm rollback` writes it again"
        raise StorageError(msg)
    _place_link(link, target, found[1])
    return found[1]


def lead_link(link: Path, target: str, etag: str | None) -> str | None:
    """Lead a link to another folder, relative to its own; gives the tag of its object, which must have had this one."""
    url = published_url(link)
    tag = None if url is None else objects.write(url, target.encode(), replacing=etag, create=etag is None)
    _place_link(link, target, tag)
    return tag


def _place_link(link: Path, target: str, etag: str | None) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    beside = link.with_name(f".{link.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target, target_is_directory=True)
    if etag is not None:
        write_stamp(link, ObjectStat(len(target), etag), beside)
    beside.replace(link)


def fetch_missing(path: Path, progress: ProgressListener = SILENT) -> Path:
    """As `fetch`, of a file in a folder that was fetched before: one that is here is not asked about again."""
    if published_url(path) is None or not (path.exists() and stamp_path(path).exists()):
        return fetch(path, progress=progress)
    with suppress(OSError):
        os.utime(stamp_path(path))  # used now
    return path


def sizes_of(folder: Path, names: Iterable[str] | None = None) -> dict[str, int | None]:
    """How many bytes files of a folder have, where it is, by default all; None where one is not there."""
    url = published_url(folder)
    if url is None:
        if names is None:
            names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        return {name: path.stat().st_size if (path := folder / name).is_file() else None for name in names}
    found = objects.listed(url)
    return {name: found[name].size_bytes if name in found else None for name in (found if names is None else names)}


def push(path: Path, last: str | None = None, *, to: Path | None = None) -> None:
    """Write a file, or all files of a folder, into the bucket; one that is there as it is here is left.

    Args:
        path: in the cache; anything else is left where it is.
        last: the file of a folder without which it is no such folder; written when all others are there.
        to: the path that it will have here, when it is complete.

    Raises:
        StorageError: it cannot be written.
    """
    to = to or path
    url = published_url(to)
    if url is None:
        return
    found = objects.listed(url) if last is not None else {}
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    names = {file.relative_to(path).as_posix(): file for file in files}
    names = {name: file for name, file in names.items() if published_url(to / name) is not None}
    there = {name: found.get(name) if last is not None else stamped(to / name, file) for name, file in names.items()}
    lead = [name for name in names if name != last]
    _each([lambda name=name: _push_file(names[name], to / name, there[name]) for name in lead])  # type: ignore[misc]
    if last is not None:
        _push_file(path / last, to / last, there[last])


def settle(path: Path, last: str) -> None:
    """Fetch `last`, as for `push`; what a process of this host had only begun to publish when it was killed is none."""
    work = path.with_name(f".{path.name}.partial")
    is_at_url = published_url(fetch(path, (last,))) is not None
    if is_at_url and work.exists() and not any(file.is_file() for file in path.rglob("*")):
        shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove what is at a URL, a folder's own files first: no half of it is taken for all.

    Raises:
        StorageError: it cannot be removed.
    """
    url = published_url(path)
    if url is None:
        return
    found = sorted(objects.listed(url), key=lambda name: (name.count("/"), name))
    for name in found if len(found) <= _AT_A_TIME else [name for name in found if "/" not in name]:
        objects.delete(f"{url}/{name}")
    objects.delete(*[f"{url}/{name}" for name in found if "/" in name or len(found) > _AT_A_TIME], url)
    _forget(path)


def move(path: Path, target: Path, last: str, others: Collection[str] = ()) -> None:
    """Give a folder another name, here and in the bucket, which may have more of it, and `others` under that name."""
    url, to = published_url(path), published_url(target)
    found = {} if url is None or to is None else objects.listed(url)
    if to is not None:  # what another job has left there when it was killed
        mine = {file.relative_to(path).as_posix() for file in path.rglob("*")} | found.keys() | {*others}
        objects.delete(*[f"{to}/{name}" for name in objects.listed(to).keys() - mine])
        shutil.rmtree(target, ignore_errors=True)
    for names in (found.keys() - {last}, found.keys() & {last}):
        _each([lambda name=name: objects.copy(f"{url}/{name}", f"{to}/{name}") for name in names])  # type: ignore[misc]
    if found:
        stamp_path(target).parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            stamp_path(path).rename(stamp_path(target))
    push(path, last, to=target)
    path.rename(target)  # what has its name here is complete there
    objects.delete(*[f"{url}/{name}" for name in found])


def remove_files(paths: Collection[Path]) -> None:
    """Remove files, and the objects of one bucket that they stand for, all at once."""
    at_urls = [path for path in paths if published_url(path) is not None]
    objects.delete(*[str(url_of(path)) for path in at_urls])
    for path in [*paths, *map(stamp_path, at_urls)]:
        path.unlink(missing_ok=True)


def files_at(path: Path) -> list[Path]:
    """The files that a URL names: of a pattern those that match it, of a prefix those in it, in the order of names.

    One path that stands for no URL, or for an object, is given back.

    Raises:
        StorageError: the bucket cannot be listed, or has none.
    """
    url = url_of(path)
    if url is None:
        return [path]
    parts = url.split("/")
    first = next((i for i, part in enumerate(parts) if {*"*?["} & {*part}), None)
    if first is None:
        names = [name for name in objects.listed(url) if not is_hidden(name)]
        return [path / name for name in sorted(names)] or [path]
    prefix = "/".join(parts[:first])
    names = [name for name in objects.listed(prefix) if fnmatchcase(name, "/".join(parts[first:]))]
    if not names:
        msg = f"{url}: no object has such a name; list them, as `aws s3 ls` does, and look at the pattern"
        raise StorageError(msg)
    return [located(f"{prefix}/{name}") for name in sorted(names)]


def is_hidden(name: str) -> bool:
    """Whether it is no data, as other programs have it: `_SUCCESS`, `.crc`, the mark of an empty folder."""
    return any(part[:1] in {"_", ".", ""} for part in name.split("/"))


def _each(tasks: Collection[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="storage") as threads:
        for _ in threads.map(lambda task: task(), tasks):  # when one has failed no other is begun
            pass


def _fetch_files(wanted: Mapping[Path, ObjectStat], progress: ProgressListener) -> None:
    missing = {path: stat for path, stat in wanted.items() if stamped(path) != stat}
    for path in wanted.keys() - missing.keys():
        os.utime(stamp_path(path))  # used now
    if missing:
        progress.start_phase("fetch", sum(stat.size_bytes for stat in missing.values()), unit="bytes")
    _each([partial(_fetch_file, path, stat, progress) for path, stat in missing.items()])


def _fetch_file(path: Path, wanted: ObjectStat, progress: ProgressListener) -> None:
    if path.name == LINK_NAME:
        fetch_link(path)
        return
    part, notes = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.blocks")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = cache_folder() / "locks" / f"{crc32(os.fsencode(path)) % 256:02x}"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if stamped(path) == wanted:  # another process has fetched it meanwhile
            return
        _make_room(wanted.size_bytes)
        had = dict.fromkeys(notes.read_text(encoding="utf-8").splitlines() if notes.exists() else [])
        if next(iter(had), None) != wanted.etag:
            had.clear()
            part.write_bytes(b"")
            notes.write_text(f"{wanted.etag}\n", encoding="utf-8")

        def fetch_block(start: int) -> None:
            end = min(start + _BLOCK_BYTES, wanted.size_bytes)
            if f"{start}." not in had:
                os.pwrite(file.fileno(), objects.read(str(url_of(path)), start, end, etag=wanted.etag), start)
                with notes.open("a", encoding="utf-8") as noted:
                    noted.write(f"{start}.\n")
            progress.advance(end - start)

        with part.open("r+b") as file:
            _each([partial(fetch_block, at) for at in range(0, wanted.size_bytes, _BLOCK_BYTES)])
        write_stamp(path, wanted, part)
        part.replace(path)
        notes.unlink()


def _push_file(path: Path, to: Path, there: ObjectStat | None) -> None:
    url = url_of(to)
    assert url is not None, "the caller has looked"
    if there is None or stamped(to, path) != there:
        write_stamp(to, ObjectStat(path.stat().st_size, objects.write(url, path)), path)


def _prune(folder: Path, found: Mapping[str, ObjectStat], listed_ns: float = math.inf) -> set[str]:
    """Remove files that were in the bucket, and are there no more; what was never there is a job's of this host.

    Gives the names of the files that are as they are in the bucket.
    """
    stamps, current = str(stamp_path(folder)), set[str]()
    for place, _, files in os.walk(stamps):
        for stamp in (f"{place}/{file}" for file in files):
            name = stamp[len(stamps) + 1 :]
            if is_unfinished(f"/{name}") or os.stat(stamp).st_mtime_ns >= listed_ns:  # noqa: PTH116
                continue  # a half written one, or one that others have written since
            if name not in found:
                (folder / name).unlink(missing_ok=True)
                Path(stamp).unlink(missing_ok=True)
                _remove_empty((folder / name).parent, folder)
            elif read_stamp(stamp, f"{folder}/{name}") == found[name]:
                current.add(name)
            else:
                Path(stamp).unlink(missing_ok=True)  # `fetch_missing` is not to take it for what is there now
    return current


def _remove_empty(folder: Path, top: Path) -> None:
    for place, _, _ in os.walk(folder, topdown=False) if folder != top else ():  # made though no file was wanted
        with suppress(OSError):
            Path(place).rmdir()
    with suppress(OSError):
        while folder != top:
            folder.rmdir()
            folder = folder.parent


def _forget(path: Path) -> None:
    """Drop what was in the bucket and is not there any more."""
    stamp = stamp_path(path)
    if stamp.is_dir():
        _prune(path, {})
        shutil.rmtree(stamp, ignore_errors=True)
        with suppress(OSError):
            path.rmdir()
    elif stamp.exists():
        path.unlink(missing_ok=True)
        stamp.unlink(missing_ok=True)


def _make_room(num_bytes: int) -> None:
    """Remove files that the bucket has, the longest unused first, until so much fits into the limit."""
    limit = os.environ.get(LIMIT_VARIABLE)
    if not limit:
        return
    with _evicting:
        by_use = []
        for stamp in (cache_folder() / STAMPS_NAME).rglob("*"):
            path = cache_folder() / stamp.relative_to(cache_folder() / STAMPS_NAME)
            with suppress(OSError):  # another process removes, too
                if stamp.is_file() and not path.is_symlink():
                    by_use.append((stamp.stat().st_mtime_ns, path.stat().st_size, path, stamp))
        left = sum(size_bytes for _, size_bytes, _, _ in by_use) + num_bytes - parse_bytes(limit, LIMIT_VARIABLE)
        for _, size_bytes, path, stamp in sorted(by_use):
            if left <= 0:
                return
            if stamped(path) is None:
                continue  # written to since: what the bucket does not have yet
            path.unlink(missing_ok=True)  # who has it open or mapped keeps it
            stamp.unlink(missing_ok=True)
            left -= size_bytes
