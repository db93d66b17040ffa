"""Reads, writes and lists the objects of a bucket, patiently.

In: URLs.  Out: bytes, or a `StorageError` that names bucket and key and what to do.  Credentials, region and address
are found as other clients find them (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, a role of the machine, boto3's profiles
where boto3 is installed; Google's and Azure's likewise), and stand in no message.

What may pass is tried again for `TORCHDLRM_STORAGE_PATIENCE_S` seconds: a server that is busy or away, a connection
that ends in the middle of an object.
"""

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

from torchdlrm.errors import StorageError

PATIENCE_VARIABLE = "TORCHDLRM_STORAGE_PATIENCE_S"
_PATIENCE_S = 120.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_TIMEOUT_S, _CONNECT_TIMEOUT_S = 60, 10
_Result = TypeVar("_Result")
# What the servers' errors say -> what helps. The first that is found is said.
_REMEDIES: tuple[tuple[str, str], ...] = (
    ("NoSuchBucket|ContainerNotFound|bucket does not exist", "there is no such bucket; look at its name"),
    ("ExpiredToken|token.*expired|TokenRefreshRequired", "the credentials have expired; get new ones and start again"),
    (
        "InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|AuthenticationFailed|InvalidClientTokenId",
        "the credentials are wrong; look at AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or those of your cloud",
    ),
    ("RequestTimeTooSkewed", "the clock of this machine is wrong; set it, as `timedatectl set-ntp true` does"),
    (
        "PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint|bare redirect",
        "the bucket is in another region; set AWS_REGION",
    ),
    (
        "SlowDown|TooManyRequests|Throttl|status code: (503|429)",
        "the server asks for fewer requests and went on doing so",
    ),
    (
        "Unauthenticated|metadata service|instance metadata|169\\.254|Missing.*credential|credential",
        "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role",
    ),
    (
        "AccessDenied|status code: 403|Permission",
        "the credentials do not allow it; grant reading, listing and writing there",
    ),
    (
        "error sending request|dns error|[Cc]onnect|timed out|operation timed",
        "the server does not answer; look at the network, and at AWS_ENDPOINT_URL where it is set",
    ),
)


@dataclass(frozen=True)
class ObjectStat:
    """What identifies an object: the bucket's tag of its content, and its size; when it was written, by `stat`."""

    size_bytes: int
    etag: str
    modified_ns: int = field(default=0, compare=False)


class ChangedError(StorageError):
    """An object is not, or no longer, the one that was meant."""


def read(url: str, start: int = 0, end: int | None = None, *, etag: str | None = None) -> bytes:
    """The bytes of an object from `start` (negative: from its end) to `end`; of that one alone which has this tag.

    Raises:
        FileNotFoundError: there is no such object.
        ChangedError: it has another tag.
        StorageError: it cannot be read.
    """
    if end is not None and end <= start:
        return b""
    options: dict[str, Any] = {}
    if end is not None or start:
        options["range"] = (start, end) if end is not None else {"suffix": -start} if start < 0 else {"offset": start}
    if etag is not None:
        options["if_match"] = etag
    return _patiently(url, "read", lambda store, key: bytes(_obstore().get(store, key, options=options).bytes()))


def read_if_changed(url: str, etag: str | None, *, patience_s: float | None = None) -> tuple[bytes, str] | None:
    """A small object and its tag; None where it still is the one with this tag; `patience_s` in place of the usual.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: it cannot be read.
    """

    def get(store: Any, key: str) -> tuple[bytes, str]:
        answer = _obstore().get(store, key, options={} if etag is None else {"if_none_match": etag})
        return bytes(answer.bytes()), _tag(answer.meta)

    try:
        return _patiently(url, "read", get, patience_s)
    except _NotModified:
        return None


def write(url: str, content: Any, *, replacing: str | None = None, create: bool = False) -> str:
    """Write an object whole or not at all; returns its tag.

    Args:
        url: the object.
        content: bytes, or the path of a file.
        replacing: the tag of the object that it takes the place of.
        create: only where there is none.

    Raises:
        ChangedError: there is one, or another than that.
        StorageError: it cannot be written.
    """
    how: dict[str, Any] = {}
    if create or replacing is not None:
        how = {"mode": "create" if create else {"e_tag": replacing}, "use_multipart": False}

    def put(store: Any, key: str) -> str:
        return _tag(_obstore().put(store, key, content, **how))

    try:
        return _patiently(url, "written", put)
    except ChangedError:
        # The answer to a write may have been lost, and the write tried again.
        if how and isinstance(content, bytes):
            found = read_if_changed(url, None)
            if found is not None and found[0] == content:
                return found[1]
        raise


def stat(url: str) -> ObjectStat:
    """What identifies an object.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: it cannot be looked at.
    """
    found = _patiently(url, "looked at", lambda store, key: _obstore().head(store, key))
    return ObjectStat(found["size"], _tag(found), int(found["last_modified"].timestamp()) * 10**9)


def listed(url: str) -> dict[str, ObjectStat]:
    """All objects under a prefix, a folder's: what identifies each, by its key relative to the prefix.

    Raises:
        StorageError: they cannot be listed.
    """

    def walk(store: Any, key: str) -> dict[str, ObjectStat]:
        prefix = f"{key}/" if key else ""
        pages: Iterator[Any] = _obstore().list(store, prefix or None)
        return {
            found["path"].removeprefix(prefix): ObjectStat(found["size"], _tag(found))
            for page in pages
            for found in page
            if found["path"].startswith(prefix)
        }

    return _patiently(url, "listed", walk)


def copy(url: str, target: str) -> None:
    """Copy an object inside of its bucket, by the bucket itself."""
    _patiently(url, "copied", lambda store, key: _obstore().copy(store, key, _split(target)[1]))


def delete(*urls: str) -> None:
    """Remove objects of one bucket, those that are not there too."""
    keys = [_split(url)[1] for url in urls]
    try:
        if keys:
            _patiently(urls[0], "removed", lambda store, _: _obstore().delete(store, keys))
    except FileNotFoundError:  # S3 says nothing of those that are not there; the others may have come no further
        for url in urls if len(urls) > 1 else ():
            delete(url)


def _tag(found: Any) -> str:
    """The tag as a request has it: Azure lists tags without their quotes."""
    tag: str = found["e_tag"]
    return tag if tag.endswith('"') else f'"{tag}"'


def _obstore() -> Any:
    import obstore  # noqa: PLC0415 - only who has data at a URL waits for it

    return obstore


def _split(url: str) -> tuple[str, str]:
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}", key


class _NotModified(Exception):  # noqa: N818 - it is no error
    """The object is still the same."""


@lru_cache(maxsize=32)
def _store(bucket: str, environment: tuple[tuple[str, str], ...]) -> Any:
    """A client of a bucket; another one once what it is configured by has changed."""
    from obstore.store import from_url  # noqa: PLC0415

    settings: dict[str, Any] = {
        "client_options": {
            "allow_http": True,
            "timeout": f"{_TIMEOUT_S}s",
            "connect_timeout": f"{_CONNECT_TIMEOUT_S}s",
        },
        # Whole operations are tried again here: obstore does not resume a body that was cut.
        "retry_config": {"max_retries": 2, "retry_timeout": timedelta(seconds=10)},
    }
    names = {name for name, _ in environment}
    is_profile = bucket.startswith("s3://") and "AWS_ACCESS_KEY_ID" not in names
    if is_profile and not names & {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_WEB_IDENTITY_TOKEN_FILE"}:
        try:
            from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415

            settings["credential_provider"] = Boto3CredentialProvider()
        except (ImportError, ValueError):  # no boto3, or no profile of it: a role of the machine
            pass
    return from_url(bucket, **settings)


def _patiently(
    url: str, done: str, operation: Callable[[Any, str], _Result], patience_s: float | None = None
) -> _Result:
    """Do an operation on a bucket and a key; what may pass is waited for."""
    from obstore import exceptions  # noqa: PLC0415

    bucket, key = _split(url)
    environment = tuple(sorted((name, value) for name, value in os.environ.items() if _configures(name)))
    if patience_s is None:
        patience_s = float(os.environ.get(PATIENCE_VARIABLE) or _PATIENCE_S)
    pause_s, until_s = _FIRST_PAUSE_S, time.monotonic() + patience_s
    while True:
        try:
            return operation(_store(bucket, environment), key)
        except FileNotFoundError as error:
            if re.search(_REMEDIES[0][0], str(error)) is None:
                msg = f"{url}: there is no such object"
                raise FileNotFoundError(msg) from None
            raise _failed(url, done, error) from None
        except exceptions.NotModifiedError:
            raise _NotModified from None
        except (exceptions.PreconditionError, exceptions.AlreadyExistsError):
            msg = f"{url}: is not the object that was there; another process has written it"
            raise ChangedError(msg) from None
        except (exceptions.BaseError, OSError, ValueError) as error:
            may_pass = isinstance(error, exceptions.GenericError | OSError) and not _is_final(str(error))
            if not may_pass or time.monotonic() + pause_s > until_s:
                raise _failed(url, done, error) from None
        time.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _configures(name: str) -> bool:
    return name.startswith(("AWS_", "GOOGLE_", "AZURE_"))


def _is_final(said: str) -> bool:
    return any(re.search(pattern, said) for pattern, _ in _REMEDIES[:5])


def _failed(url: str, done: str, error: Exception) -> StorageError:
    said = str(error)
    remedy = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, said)), None)
    message = re.search(r"<Message>(.*?)(?:\n|\\n|</Message>)", said)
    first_line = (said.splitlines() or [""])[0]
    detail = message[1] if message else re.sub(r"https?://\S*", "", first_line)
    return StorageError(
        f"{url}: cannot be {done}: {remedy or detail}" + (f" ({message[1]})" if message and remedy else "")
    )
