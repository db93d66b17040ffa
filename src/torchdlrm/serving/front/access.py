"""Decides who may ask: clients with an API key, or, without keys, those who call the server by its own name.

A server without a key must not answer pages of other sites.  A page from anywhere can have the browser of its
visitor send requests to this machine, and, once its own name is made to point here (DNS rebinding), read the answers.
The headers give it away: `Host` has a name that is not the server's, or `Sec-Fetch-Site` and `Origin` name another
site.
"""

import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Final

from torchdlrm.errors import ConfigError
from torchdlrm.prediction.client import API_KEY_VARIABLE

# Names that cannot be given on the internet: of this machine, of containers, of a cluster's services.
_PRIVATE_SUFFIXES: Final = (".localhost", ".internal", ".svc", ".svc.cluster.local")
_HOST: Final = re.compile(r"(?:\[([^\]]*)\]|([^:\[]*))(?::\d*)?")  # an address or a name, and a port
_OF_THE_SAME_SITE: Final = {b"same-origin", b"none"}


class ApiKeys:
    """The keys that are accepted; none means that everything is open.

    Args:
        keys: any number, so that one can be replaced while clients still use the other.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, headers: Mapping[bytes, bytes]) -> bool:
        """Tell whether one of the keys stands in the headers, whose names are in lower case.

        That is `Authorization: Bearer KEY` or `X-API-Key: KEY`.
        """
        if not self._digests:
            return True
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        key = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        digest = sha256(key).digest()
        # Every key is compared, in a time that tells nothing of it.
        return bool(key) and sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """Read the keys in a file, one a line; without a file, the key in the variable DLRM_API_KEY, if it is set.

    Blank lines, lines that begin with #, and a byte order mark are no keys.

    Raises:
        ConfigError: the file cannot be read or holds no key, or a key cannot be sent as a header.
    """
    if path is None:
        key = os.environ.get(API_KEY_VARIABLE, "").strip()
        return (key,) if key else ()
    try:
        # Cut at \n alone: parts between other separators would be keys that were not meant.
        lines = [line.strip(" \t\r") for line in path.read_bytes().decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ConfigError(f"`api_key_file` {path}: is no text in UTF-8; write one key a line") from error
    except OSError as error:
        raise ConfigError(f"`api_key_file` {path}: cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.isprintable():
            raise ConfigError(
                f"`api_key_file` {path}: line {number} holds a character that no header may have; write one key a line"
            )
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"`api_key_file` {path}: holds no key; write one a line")
    return keys


class AllowedHosts:
    """The names that clients may use for a server.

    Args:
        host: where it listens.
        also: more names: `model.example.com`, `*.example.com`, or `*` for any, where a proxy sees to it.
    """

    def __init__(self, host: str, also: tuple[str, ...]) -> None:
        self._is_any = "*" in also
        self._own = {host.lower(), socket.gethostname().lower()}
        self._also = {name.lower() for name in also if not name.startswith("*")}
        self._suffixes = tuple(name[1:].lower() for name in also if name.startswith("*."))
        self._accepts_host = lru_cache(maxsize=256)(self._is_own)

    def refusal(self, method: str, headers: Mapping[bytes, bytes], *, is_for_all: bool) -> str | None:
        """Say why a request is not answered, or None if it is.

        The names of its headers are in lower case; `is_for_all` says whether what it asks for may be shown by any site.
        """
        if self._is_any:
            return None
        host = headers.get(b"host", b"")  # every browser sends one
        if host and not self._accepts_host(host):
            name = _name_of(host)[:80]
            return (
                f"Host: {name!r} is not known as a name of this server, which has no API key and so answers to its own "
                f"names alone; start it with `allowed_hosts` {name}, or with a key"
            )
        if not is_for_all and self._is_foreign(method, host, headers):
            return (
                "this request comes from a page of another site, which a server without an API key does not answer; "
                "start it with `allowed_hosts` and that site's name, or with a key"
            )
        return None

    def _is_own(self, host: bytes) -> bool:
        name = _name_of(host)
        if "[" in name:
            return False
        if "." not in name or name.endswith(_PRIVATE_SUFFIXES) or name in self._own or self._is_listed(name):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # a page that knows the address did not need a name to be pointed here

    def _is_listed(self, name: str) -> bool:
        return name in self._also or name.endswith(self._suffixes)

    def _is_foreign(self, method: str, host: bytes, headers: Mapping[bytes, bytes]) -> bool:
        site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
        if site is None:
            is_foreign = origin is not None and origin.partition(b"://")[2].lower() != host.lower()
        else:
            is_link = method == "GET" and headers.get(b"sec-fetch-mode") == b"navigate"  # opens in a tab of its own
            is_foreign = site not in _OF_THE_SAME_SITE and not is_link
        return is_foreign and not (origin is not None and self._is_listed(_name_of(origin.partition(b"://")[2])))


def _name_of(host: bytes) -> str:
    """Return the name alone: `Model.example.com.:8080` -> `model.example.com`; `[::1]:8080` -> `::1`."""
    text = host.decode("latin-1").lower()
    found = _HOST.fullmatch(text)
    return text if found is None else (found[1] or found[2] or "").rstrip(".")
