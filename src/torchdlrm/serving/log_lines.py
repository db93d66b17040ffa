"""The server's log: one JSON object a line on standard error.

Lines are written by a thread of its own, so that a reader of the log who stalls does not stop the server; when too many
wait, lines are left out and their number is told.
"""

import logging
import queue
import sys
import threading
import time
from typing import Any, TextIO

import orjson

from torchdlrm.serving.options import LogLevel

_LEVELS: dict[LogLevel, int] = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_MAX_WAITING = 10_000


class LogLines:
    """Writes events as lines of JSON.

    Args:
        level: what is below it is not written.
        stream: where to; by default standard error.
    """

    def __init__(self, level: LogLevel, stream: TextIO | None = None) -> None:
        self.level = _LEVELS[level]
        self._stream = sys.stderr if stream is None else stream
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(_MAX_WAITING)
        self._num_lost = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def write(self, level: LogLevel, event: str, **fields: object) -> None:
        """Write a line; never waits."""
        if _LEVELS[level] >= self.level:
            self._put(level, event, fields)

    def note(self, event: str, **fields: object) -> None:
        """Write what happens to the server itself, such as its start: nothing to warn of, but there at every level."""
        self._put("info", event, fields)

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is waiting, unless nobody reads it."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _put(self, level: LogLevel, event: str, fields: dict[str, object]) -> None:
        try:
            self._lines.put_nowait({"time": time.time(), "level": level, "event": event, **fields})
        except queue.Full:
            self._num_lost += 1

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._num_lost:
                line["lines_lost_before"], self._num_lost = self._num_lost, 0
            line["time"] = (
                time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(line["time"])) + f".{line['time'] % 1:.3f}"[2:] + "Z"
            )
            try:
                self._stream.write(orjson.dumps(line, default=str).decode() + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                return  # nobody is there to read


class LibraryHandler(logging.Handler):
    """Brings what libraries log (uvicorn, asyncio, grpc) into the same lines."""

    def __init__(self, lines: LogLines) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, with the trace of its exception if there is one."""
        fields = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            fields["trace"] = logging.Formatter().formatException(record.exc_info)
        self._lines.write("error" if record.levelno >= logging.ERROR else "warning", "library", **fields)
