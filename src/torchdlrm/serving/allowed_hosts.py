"""Whether a request was meant for this server, where no key says so: other pages must not speak through a browser.

A page from anywhere can have the browser of whoever looks at it send requests to this machine, and, once its own
name is made to point here (DNS rebinding), read the answers.  The headers give it away: `Host` has a name that is not
the server's, or `Sec-Fetch-Site` and `Origin` name another site.  A server with a key needs none of this.
"""

import ipaddress
import socket
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

# Names that nobody on the internet can be given: of this machine, of containers, of a cluster's services.
_PRIVATE_SUFFIXES: Final = (".localhost", ".internal", ".svc", ".svc.cluster.local")
_OF_THE_SAME_SITE: Final = {b"same-origin", b"none"}


class AllowedHosts:
    """The names by which a server may be asked.

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
        """Why a request is not answered, if it is not.

        Args:
            method: of the request.
            headers: names in lower case.
            is_for_all: whether what is asked for may be shown by any site.
        """
        if self._is_any:
            return None
        host = headers.get(b"host", b"")  # every browser sends one
        if host and not self._accepts_host(host):
            name = _name_of(host)[:80]
            return (
                f"Host: {name!r} is not known as a name of this server, which has no API key and so answers to its own "
                f"names alone; start it with --allowed-hosts {name}, or with a key"
            )
        if not is_for_all and self._is_foreign(method, host, headers):
            return (
                "this request comes from a page of another site, which a server without an API key does not answer; "
                "start it with --allowed-hosts and that site's name, or with a key"
            )
        return None

    def _is_own(self, host: bytes) -> bool:
        name = _name_of(host)
        if "." not in name or name.endswith(_PRIVATE_SUFFIXES) or name in self._own or self._is_listed(name):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # whoever knows the address did not need a name to be pointed here

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
    """`Model.example.com.:8080` -> `model.example.com`; `[::1]:8080` -> `::1`."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].rstrip(".")
