"""Downloads public click logs; an interrupted download is resumed where it stopped.

In: the name of a log, the days wanted, a folder.  Out: the files under their names; an incomplete one has `.part`
behind its name, and its entity tag in `.part.etag`, so that halves of two versions are never put together.

Addresses are in `SOURCES` and nowhere else.  Checksums are compared where the source has a file `sha256sums.txt`
(lines of `sha256sum`).
"""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any
from urllib.parse import urljoin, urlsplit

from torchdlrm.errors import ConfigError, DatasetError, LogError
from torchdlrm.files import sha256_of
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.find import find_files
from torchdlrm.progress import ProgressListener, SilentProgress

_BLOCK_BYTES = 1 << 20
_TIMEOUT_S = 60.0
_SUMS_NAME = "sha256sums.txt"
_HTTP_PARTIAL, _HTTP_NOT_SATISFIABLE = 206, 416
# Attempts in a row that bring not one byte; any progress starts the count again.
DEFAULT_ATTEMPTS = 5


@dataclass(frozen=True)
class Source:
    """Where a public log lies: its files are at `base` + their names; `days` is None for a log that is one file."""

    base: str
    name: str
    days: int | None

    def file_names(self, days: Sequence[int] | None) -> list[str]:
        """The names of the files of some days, or all."""
        if self.days is None:
            return [self.name]
        return [self.name.format(day=day) for day in (range(self.days) if days is None else days)]


SOURCES = {
    "criteo-kaggle": Source(
        "https://go.criteo.net/", "criteo-research-kaggle-display-advertising-challenge-dataset.tar.gz", None
    ),
    "criteo-1tb": Source("https://huggingface.co/datasets/criteo/CriteoClickLogs/resolve/main/", "day_{day}.gz", 24),
}


def parse_days(text: str, num_days: int) -> list[int]:
    """`0-6,23` -> the days it names.

    Raises:
        ConfigError: it is not of that form, or names a day that there is not.
    """
    days: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"`days`: expected days such as 0-23 or 0,5,7, got {text!r}")
        days += range(int(first), int(last or first) + 1)
    if not days or max(days) >= num_days:
        raise ConfigError(f"`days`: days are 0 to {num_days - 1}, got {text!r}")
    return sorted(set(days))


def download(
    source: Source,
    out: Path,
    days: Sequence[int] | None = None,
    *,
    at_a_time: int = 4,
    attempts: int = DEFAULT_ATTEMPTS,
    retry_after_s: float = 1.0,
    progress: ProgressListener | None = None,
) -> tuple[LogFile, ...]:
    """Fetch the files of a log into folder `out`; what is there already is not fetched again.

    Args:
        source: where the log lies.
        out: the folder; made where there is none.
        days: which days, None for all.
        at_a_time: files that are fetched at a time.
        attempts: attempts in a row without a byte after which to give up.
        retry_after_s: wait before the second attempt, twice as long before each further one.
        progress: shows the bytes fetched.

    Raises:
        LogError: the server does not have a file, does not answer, or sent other bytes than the checksum says.
        DatasetError: the folder cannot be written.
    """
    if at_a_time < 1:
        raise ConfigError(f"`at_a_time`: must be at least 1, got {at_a_time}")
    names = source.file_names(days)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(f"{out}: cannot be made: {error.strerror}") from error
    sums = _fetch_sums(source)
    stop, lock = Event(), Lock()
    progress = progress or SilentProgress()
    progress.start_phase(f"download {len(names)} files", None, "bytes")

    def advance(num_bytes: int) -> None:
        if stop.is_set():
            raise _StoppedError
        with lock:
            progress.advance(num_bytes)

    def fetch(name: str) -> None:
        try:
            _fetch(urljoin(source.base, name), out / name, sums.get(name), advance, stop, attempts, retry_after_s)
        except BaseException:
            stop.set()  # the others stop at their next block
            raise

    with ThreadPoolExecutor(at_a_time) as threads:
        futures = [threads.submit(fetch, name) for name in names]
        try:
            errors = [future.exception() for future in futures]
        except KeyboardInterrupt:
            stop.set()
            raise
    first = next((error for error in errors if error is not None and not isinstance(error, _StoppedError)), None)
    if first is not None:
        raise first
    return find_files([out / name for name in names])


class _StoppedError(Exception):
    """Another file could not be fetched, so that this one is left for later."""


def _fetch(
    url: str,
    target: Path,
    sha256: str | None,
    advance: Callable[[int], None],
    stop: Event,
    attempts: int,
    retry_after_s: float,
) -> None:
    """Fetch one file, with attempts in a row where the server fails."""
    part, tag = (target.with_name(target.name + suffix) for suffix in (".part", ".part.etag"))
    if target.exists():
        _check(target, sha256)
        return
    if part.is_symlink() or tag.is_symlink():
        raise DatasetError(f"{part}: a link, which no interrupted download leaves; remove it, or give another `out`")
    failures = 0
    while True:
        before = _size_of(part)
        try:
            _fetch_rest(url, part, tag, advance)
            break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                msg = f"{url}: the server answers {error.code} {error.reason}; give another `source`"
                raise LogError(msg) from error
            failures = 0 if _size_of(part) > before else failures + 1
            if failures >= attempts:
                raise LogError(
                    f"{url}: no byte came in {attempts} attempts ({error}); what has come is kept, and the same "
                    "command resumes it"
                ) from error
            stop.wait(retry_after_s * 2 ** max(0, failures - 1))
        except OSError as error:
            msg = f"{part}: cannot be written: {error.strerror or error}; what has come is kept"
            raise DatasetError(msg) from error
    _check(part, sha256)
    part.replace(target)
    tag.unlink(missing_ok=True)


def _fetch_rest(url: str, part: Path, tag: Path, advance: Callable[[int], None]) -> None:
    """Append what is missing of a file; returns when it is complete."""
    have, version = _size_of(part), tag.read_text(encoding="utf-8") if tag.exists() else ""
    headers = {"Accept-Encoding": "identity"}
    if have and version:
        # If the file at the server is another by now, it comes from its beginning.
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        answer = _open(url, headers)
    except urllib.error.HTTPError as error:
        if error.code == _HTTP_NOT_SATISFIABLE and error.headers.get("Content-Range") == f"bytes */{have}":
            return
        raise
    with answer:
        start = (answer.headers.get("Content-Range") or "").removeprefix("bytes ").split("-")[0]
        resumes = answer.status == _HTTP_PARTIAL and start == str(have)
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        tag.write_text("" if version.startswith("W/") else version, encoding="utf-8")
        left = answer.headers.get("Content-Length")
        expected = None if left is None else int(left) + (have if resumes else 0)
        with part.open("ab" if resumes else "wb") as file:
            while block := answer.read(_BLOCK_BYTES):
                file.write(block)
                advance(len(block))
    if expected is not None and _size_of(part) < expected:
        raise ConnectionError(f"the connection was closed after {_size_of(part):,} of {expected:,} bytes")


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check(path: Path, sha256: str | None) -> None:
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise LogError(f"{path}: sha256 is {found}, and should be {sha256}; remove the file and fetch it again")


def _fetch_sums(source: Source) -> dict[str, str]:
    """The checksums that the source publishes with its files; none where it does not."""
    try:
        with _open(urljoin(source.base, _SUMS_NAME), {}) as answer:
            lines = [line.split() for line in answer.read(_BLOCK_BYTES).decode("ascii").splitlines()]
    except (OSError, http.client.HTTPException, UnicodeDecodeError):
        return {}
    return {line[1].lstrip("*"): line[0] for line in lines if len(line) == 2 and len(line[0]) == 64}


def _open(url: str, headers: Mapping[str, str]) -> Any:
    if urlsplit(url).scheme not in ("http", "https"):
        raise ConfigError(f"`source`: expected an address that starts with http:// or https://, got {url!r}")
    request = urllib.request.Request(url, headers={"User-Agent": "torchdlrm", **headers})  # noqa: S310 - as just seen
    return urllib.request.urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310
