"""Gives each URL a path: where its object, or all under its prefix, lies in the cache of this host.

    s3://clicks/days/1.gz    CACHE/s3/clicks/days/1.gz

Code below the command line knows paths alone.  Whatever is at a URL is brought into the cache before it is read
(`torchdlrm.storage.mirror.fetch`), and what is made there is in the bucket once `torchdlrm.files` has made it complete.
Where a part of a path starts with a point, it is unfinished work, and stays on this host.
"""

import os
import re
from functools import lru_cache
from pathlib import Path, PurePosixPath

from torchdlrm.errors import StorageError

CACHE_VARIABLE = "TORCHDLRM_CACHE"
SCHEMES = ("s3", "gs", "az")
_URL = re.compile(r"(s3|gs|az|file):/{1,3}(?=[^/])")  # a `Path` of a URL has one slash
_SERVERS = ("https?", "tcp", "tls", "ucxx?", "wss?")  # not places of files: a Dask scheduler's, a web server's
_NAMES_OF_OTHERS = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az", "azure": "az"}


def cache_folder() -> Path:
    """Where the cache is: `TORCHDLRM_CACHE`, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return _real(os.environ.get(CACHE_VARIABLE) or f"{home}/torchdlrm")


@lru_cache(maxsize=8)  # it is asked for every file
def _real(folder: str) -> Path:
    return Path(os.path.realpath(folder))


def located(location: str | Path) -> Path:
    """The path that stands for a path or a URL; one that was located already is given back.

    Raises:
        StorageError: the URL names no bucket, has no key that a file could have, or is of another kind.
    """
    text = os.fspath(location)
    found = _URL.match(text)
    if found is None:
        scheme = re.match(r"([a-z0-9+]+)://", text)
        if scheme is None:
            return Path(location)
        meant = _NAMES_OF_OTHERS.get(scheme[1])
        which = f"write {meant}://" if meant else f"a URL begins with {', '.join(f'{name}://' for name in SCHEMES)}"
        msg = f"{text}: {scheme[1]}:// is not read; {which}"
        raise StorageError(msg)
    if found[1] == "file":
        return Path("/" + text[found.end() :])
    parts = PurePosixPath(text[found.end() :]).parts
    if {"..", "."} & {*text[found.end() :].split("/")}:
        msg = f"{text}: a key with . or .. for a name is none that a file could have; give another"
        raise StorageError(msg)
    return cache_folder().joinpath(found[1], *parts)


def url_of(path: Path) -> str | None:
    """The URL that a path stands for; None of one that is on a disk alone."""
    try:
        scheme, *parts = path.absolute().relative_to(cache_folder()).parts
    except ValueError:
        return None
    is_key = scheme in SCHEMES and parts and ".." not in parts  # as a damaged manifest may have it, to lead elsewhere
    return f"{scheme}://{'/'.join(parts)}" if is_key else None


def published_url(path: Path) -> str | None:
    """As `url_of`; None also of what is unfinished work."""
    url = url_of(path)
    return None if url is None or is_unfinished(url) else url


def is_unfinished(url: str) -> bool:
    """Whether a part starts with a point; the file that torch calls so in each checkpoint is none of these."""
    return "/." in url.removesuffix("/.metadata")


def shown(path: Path) -> str:
    """How people call a path, and what is written down: its URL where it has one."""
    return url_of(path) or str(path)


def with_urls(text: str) -> str:
    """A text for people: URLs in place of their paths in the cache."""
    return re.sub(re.escape(str(cache_folder())) + rf"/({'|'.join(SCHEMES)})/", r"\1://", text)


def with_paths(token: str) -> str:
    """A token of a command line: for a URL in it, also behind `=`, the path that stands for it."""
    head, at, url = token.rpartition("=") if "=" in token.partition("://")[0] else ("", "", token)
    is_place = _URL.match(url) or re.match(rf"(?!({'|'.join(_SERVERS)})://)[a-z0-9]+://", url)
    return f"{head}{at}{located(url)}" if is_place else token
