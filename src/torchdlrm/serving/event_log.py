"""Writes the server's log: one JSON object per line on standard error.

In: events with fields, and what libraries log.  Out: lines.  They go through a queue of the standard library's logging
to a thread that writes them, so that a reader of the log who stalls does not stop the server.  When too many lines
wait, further ones are dropped, and the next line that is written has their number.
"""

import copy
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from typing import Any, Final, TextIO

import orjson

_MAX_WAITING: Final = 10_000
_log = logging.getLogger("torchdlrm.serving")


def log_event(level: int, event: str, **fields: object) -> None:
    """Log an event, if its level is one that is logged; never wait."""
    if _log.isEnabledFor(level):
        _handle(level, event, fields)


def note_event(event: str, **fields: object) -> None:
    """Log what happens to the server itself, such as its start, at every level; never wait."""
    _handle(logging.INFO, event, fields)


def _handle(level: int, event: str, fields: dict[str, object]) -> None:
    # Made here: `Logger.log` would first walk the stack to find its caller, which takes longer than all the rest.
    record = logging.LogRecord(_log.name, level, "", 0, event, None, None)
    record.fields = fields
    _log.handle(record)


@contextmanager
def json_log(level: str, stream: TextIO | None = None, *, timeout_s: float = 2.0) -> Iterator[None]:
    """Write all that this process logs as lines of JSON; of libraries, warnings and errors.

    Args:
        level: of the server's own events; those below it are not written.
        stream: where to; by default standard error.
        timeout_s: how long to wait at the end for a reader to take what is waiting.
    """
    output = _Output(sys.stderr if stream is None else stream)
    output.setFormatter(_JsonFormatter())
    records: queue.Queue[Any] = queue.Queue(_MAX_WAITING)
    handler, listener = _DroppingHandler(records), QueueListener(records, output)
    root = logging.getLogger()
    level_before, handlers_before = _log.level, root.handlers
    # Some library has called `logging.basicConfig`: its plain lines would stand between ours.
    root.handlers = [handler, *(other for other in root.handlers if type(other) is not logging.StreamHandler)]
    _log.setLevel(level.upper())
    listener.start()
    try:
        yield
    finally:
        root.handlers = handlers_before
        _log.setLevel(level_before)
        _stop(listener, records, timeout_s)


def _stop(listener: QueueListener, records: "queue.Queue[Any]", timeout_s: float) -> None:
    """Write what is waiting and end the thread; where a reader stalls, both are left as they are after that time."""
    is_written = threading.Event()
    try:
        records.put(is_written, timeout=timeout_s)
    except queue.Full:
        return
    if is_written.wait(timeout_s):
        listener.stop()


class _DroppingHandler(QueueHandler):
    """Puts records into the queue, and drops them where it is full."""

    def __init__(self, records: "queue.Queue[Any]") -> None:
        super().__init__(records)
        self._num_dropped = 0
        self.addFilter(lambda record: hasattr(record, "fields") or record.levelno >= logging.WARNING)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Keep the text of a trace instead of its frames, which know rows and models."""
        if (trace := record.exc_info) and trace[0] is not None:
            record = copy.copy(record)
            record.exc_text, record.exc_info = logging.Formatter().formatException(trace), None
        record.num_dropped_before = self._num_dropped
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put a record into the queue, or count it where the queue is full; never wait."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self._num_dropped += 1
        else:
            self._num_dropped -= record.num_dropped_before  # type: ignore[attr-defined]  # by `prepare`


class _Output(logging.StreamHandler[TextIO]):
    def handle(self, record: logging.LogRecord | threading.Event) -> bool:
        """Write a record; an event in its place is set, because all before it is written."""
        if isinstance(record, threading.Event):
            record.set()
            return True
        return super().handle(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - as logging calls it
        """Ignore that the reader has gone."""


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one object: time, level and event, then its fields."""
        fields: dict[str, object] | None = getattr(record, "fields", None)
        if fields is None:
            fields = {"logger": record.name, "message": record.getMessage()}
            if record.exc_text:
                fields["trace"] = record.exc_text
            event = "library"
        else:
            event = record.msg
        if num_dropped := getattr(record, "num_dropped_before", 0):
            fields = {**fields, "lines_lost_before": num_dropped}
        level = "error" if record.levelno >= logging.ERROR else record.levelname.lower()
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        at = f"{seconds}.{int(record.created % 1 * 1e3):03d}Z"
        return orjson.dumps({"time": at, "level": level, "event": event, **fields}, default=str).decode()
