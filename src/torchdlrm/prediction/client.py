"""Asks a running server for predictions, with the standard library alone."""

import http.client
import json
import os
import time
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from torchdlrm.errors import UserError

API_KEY_VARIABLE = "DLRM_API_KEY"
_ROWS_PER_REQUEST = 256
_TIMEOUT_S = 60.0
_MAX_TRIES = 10
_BUSY = {429, 503}


class PredictionClient:
    """A server of a bundle; a context manager.

    Args:
        url: where it answers, for example http://localhost:8080; a key in DLRM_API_KEY is sent along.

    Raises:
        UserError: that is no address.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise UserError(f"`url`: {url!r} is no address of a server; give one such as http://localhost:8080")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=_TIMEOUT_S)
        self._url, self._path = url, parts.path.rstrip("/") + "/predict"
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY_VARIABLE, "").strip():
            self._headers["X-API-Key"] = key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def predict(self, rows: Sequence[dict[str, object]], *, version: str) -> NDArray[np.float64]:
        """The probability of each row: float64 [B], of several labels [B, L].

        Args:
            rows: B rows by column name.
            version: of the bundle that must answer.

        Raises:
            UserError: the server cannot be reached, refuses, or serves another bundle.
        """
        found: list[Any] = []
        for start in range(0, len(rows), _ROWS_PER_REQUEST):
            answer = self._ask(json.dumps({"rows": rows[start : start + _ROWS_PER_REQUEST]}))
            if answer["version"] != version:
                raise UserError(
                    f"`url`: {self._url} serves version {answer['version']} of {answer['model']!r}, and the bundle "
                    f"is version {version}"
                )
            labels = answer.get("labels")
            found += answer["predictions"] if labels is None else [*zip(*labels.values(), strict=True)]
        return np.array(found)

    def _ask(self, body: str) -> dict[str, Any]:
        for attempt in range(_MAX_TRIES):
            try:
                self._connection.request("POST", self._path, body, self._headers)
                response = self._connection.getresponse()
                text = response.read()
            except (OSError, http.client.HTTPException) as error:
                msg = f"`url`: {self._url} cannot be reached: {error}; is `dlrm serve` running there?"
                raise UserError(msg) from error
            if response.status not in _BUSY or attempt == _MAX_TRIES - 1:
                break
            time.sleep(float(response.getheader("Retry-After", "1")))
        if response.status != http.client.OK:
            reason = text.decode(errors="replace")
            raise UserError(f"`url`: {self._url} answers {response.status} {response.reason}: {reason:.300}")
        return json.loads(text)
