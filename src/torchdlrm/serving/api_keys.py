"""Whether a request may be answered: keys that clients send with it."""

import hmac
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from torchdlrm.errors import ConfigError

VARIABLE = "DLRM_API_KEY"


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
        """Whether one of the keys stands in the headers: `Authorization: Bearer KEY` or `X-API-Key: KEY`.

        Args:
            headers: names in lower case.
        """
        if not self._digests:
            return True
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        key = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        digest = sha256(key).digest()
        # Every key is compared, in a time that tells nothing of it.
        return bool(key) and sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """The keys in a file, one a line; without a file, that of the variable DLRM_API_KEY; without that, none.

    Blank lines, lines that begin with #, and a byte order mark are no keys.

    Raises:
        ConfigError: the file cannot be read or holds no key, or a key cannot be sent as a header.
    """
    if path is None:
        key = os.environ.get(VARIABLE, "").strip()
        return (key,) if key else ()
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        msg = f"--api-key-file {path}: is no text in UTF-8; write one key a line"
        raise ConfigError(msg) from error
    except OSError as error:
        msg = f"--api-key-file {path}: cannot be read: {error.strerror or error}"
        raise ConfigError(msg) from error
    for number, line in enumerate(lines, start=1):
        if not line.isprintable():
            msg = (
                f"--api-key-file {path}: line {number} holds a character that no header may have; write one key a line"
            )
            raise ConfigError(msg)
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        msg = f"--api-key-file {path}: holds no key; write one a line"
        raise ConfigError(msg)
    return keys
