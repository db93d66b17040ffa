"""Downloads public click logs; an interrupted download is resumed where it stopped.

In: the name of a log, the days wanted, a folder.  Out: the files under their names; an incomplete one has `.part`
behind its name, and its entity tag in `.part.etag`, so that halves of two versions are never put together.

Addresses are in `SOURCES` and nowhere else.  Checksums are compared where they are known: in a file `sha256sums.txt`
at the source (lines of `sha256sum`), or in the table.
"""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
_HTTP_OK, _HTTP_PARTIAL, _HTTP_NOT_SATISFIABLE = 200, 206, 416
# Attempts in a row that bring not one byte; any progress starts the count again.
DEFAULT_ATTEMPTS = 5


@dataclass(frozen=True)
class Source:
    """Where a public log lies: its files are at `base` + their names; `days` is None for a log that is one file."""

    base: str
    name: str
    days: int | None
    sha256: Mapping[str, str] = field(default_factory=dict)

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
            msg = f"`days`: expected days such as 0-23 or 0,5,7, got {text!r}"
            raise ConfigError(msg)
        days += range(int(first), int(last or first) + 1)
    if not days or max(days) >= num_days:
        msg = f"`days`: days are 0 to {num_days - 1}, got {text!r}"
        raise ConfigError(msg)
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
        msg = f"`at_a_time`: must be at least 1, got {at_a_time}"
        raise ConfigError(msg)
    names = source.file_names(days)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"{out}: cannot be made: {error.strerror}"
        raise DatasetError(msg) from error
    sums = {**_fetch_sums(source), **source.sha256}
    stop, lock = Event(), Lock()
    progress = progress or SilentProgress()
    progress.start_phase(f"download {len(names)} files", None, "bytes")

    def advance(num_bytes: int) -> None:
        with lock:
            progress.advance(num_bytes)

    def fetch(name: str) -> None:
        fetcher = _Fetcher(urljoin(source.base, name), out / name, sums.get(name), advance, stop)
        try:
            fetcher.run(attempts, retry_after_s)
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


class _Fetcher:
    """Fetches one file, with attempts in a row where the server fails."""

    def __init__(self, url: str, target: Path, sha256: str | None, advance: Callable[[int], None], stop: Event) -> None:
        self._url = url
        self._target = target
        self._sha256 = sha256
        self._advance = advance
        self._stop = stop
        self._part = target.with_name(target.name + ".part")
        self._tag = target.with_name(target.name + ".part.etag")

    def run(self, attempts: int, retry_after_s: float) -> None:
        if self._target.exists():
            self._check(self._target)
            return
        if self._part.is_symlink() or self._tag.is_symlink():
            msg = f"{self._part}: a link, which no interrupted download leaves; remove it, or give another `out`"
            raise DatasetError(msg)
        failures = 0
        while True:
            before = self._num_bytes()
            try:
                self._fetch_rest()
                break
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                    msg = f"{self._url}: the server answers {error.code} {error.reason}; give another `source`"
                    raise LogError(msg) from error
                failures = 0 if self._num_bytes() > before else failures + 1
                if failures >= attempts:
                    msg = (
                        f"{self._url}: no byte came in {attempts} attempts ({error}); what has come is kept, and the "
                        "same command resumes it"
                    )
                    raise LogError(msg) from error
                self._stop.wait(retry_after_s * 2 ** max(0, failures - 1))
            except OSError as error:
                msg = f"{self._part}: cannot be written: {error.strerror or error}; what has come is kept"
                raise DatasetError(msg) from error
        self._check(self._part)
        self._part.replace(self._target)
        self._tag.unlink(missing_ok=True)

    def _num_bytes(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _fetch_rest(self) -> None:
        """Append what is missing of the file; returns when it is complete."""
        have = self._num_bytes()
        tag = self._tag.read_text(encoding="utf-8") if self._tag.exists() else ""
        headers = {"Accept-Encoding": "identity", "User-Agent": "torchdlrm"}
        if have and tag:
            # If the file at the server is another by now, it comes from its beginning.
            headers |= {"Range": f"bytes={have}-", "If-Range": tag}
        try:
            answer = _open(self._url, headers)
        except urllib.error.HTTPError as error:
            if error.code == _HTTP_NOT_SATISFIABLE and error.headers.get("Content-Range") == f"bytes */{have}":
                return
            raise
        with answer:
            resumes = answer.status == _HTTP_PARTIAL and _start_of(answer.headers.get("Content-Range")) == have
            tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            self._tag.write_text("" if tag.startswith("W/") else tag, encoding="utf-8")
            with self._part.open("ab" if resumes else "wb") as file:
                left = answer.headers.get("Content-Length")
                expected = (have if resumes else 0) + int(left) if left is not None else None
                while block := answer.read(_BLOCK_BYTES):
                    if self._stop.is_set():
                        raise _StoppedError
                    file.write(block)
                    self._advance(len(block))
        size_bytes = self._part.stat().st_size
        if expected is not None and size_bytes < expected:
            msg = f"the connection was closed after {size_bytes:,} of {expected:,} bytes"
            raise ConnectionError(msg)

    def _check(self, path: Path) -> None:
        if self._sha256 is None:
            return
        found = sha256_of(path)
        if found != self._sha256:
            msg = f"{path}: sha256 is {found}, and should be {self._sha256}; remove the file and fetch it again"
            raise LogError(msg)


def _start_of(content_range: str | None) -> int | None:
    """`bytes 5-9/10` -> 5."""
    start = (content_range or "").removeprefix("bytes ").split("-")[0]
    return int(start) if start.isdecimal() else None


def _fetch_sums(source: Source) -> dict[str, str]:
    """The checksums that the source publishes with its files; none where it does not."""
    try:
        with _open(urljoin(source.base, _SUMS_NAME), {"User-Agent": "torchdlrm"}) as answer:
            lines = [line.split() for line in answer.read(_BLOCK_BYTES).decode("ascii").splitlines()]
    except (OSError, http.client.HTTPException, UnicodeDecodeError):
        return {}
    return {line[1].lstrip("*"): line[0] for line in lines if len(line) == 2 and len(line[0]) == 64}


def _open(url: str, headers: Mapping[str, str]) -> Any:
    if urlsplit(url).scheme not in ("http", "https"):
        msg = f"`source`: expected an address that starts with http:// or https://, got {url!r}"
        raise ConfigError(msg)
    return urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers)), timeout=_TIMEOUT_S)  # noqa: S310
