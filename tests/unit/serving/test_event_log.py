"""The server's log: lines of JSON from a thread of its own, which nobody waits for."""

import io
import json
import logging
import threading
import time
from datetime import datetime

from torchdlrm.serving import event_log
from torchdlrm.serving.event_log import json_log, log_event, note_event


class Stalled(io.StringIO):
    """A reader that takes nothing until `go` is set."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def write(self, text):
        self.go.wait(10)
        return super().write(text)


def lines_of(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_events_are_written_by_level_and_notes_at_every_level():
    stream = io.StringIO()
    with json_log("warning", stream):
        log_event(logging.INFO, "request", path="/")
        note_event("serving", pid=7)
        log_event(logging.ERROR, "damaged", message="é", of=ValueError("x"))
    serving, damaged = lines_of(stream)
    assert (serving["level"], serving["event"], serving["pid"]) == ("info", "serving", 7)
    assert (damaged["level"], damaged["event"], damaged["message"], damaged["of"]) == ("error", "damaged", "é", "x")
    assert abs(datetime.fromisoformat(serving["time"]).timestamp() - time.time()) < 60


def test_warnings_of_libraries_stand_in_it_with_their_traces_and_their_news_do_not():
    stream = io.StringIO()
    with json_log("info", stream):
        logging.getLogger("library").info("news")
        try:
            raise RuntimeError("broken")
        except RuntimeError:
            logging.getLogger("library").exception("it %s", "failed")
    (line,) = lines_of(stream)
    assert (line["event"], line["logger"], line["message"]) == ("library", "library", "it failed")
    assert line["trace"].endswith("RuntimeError: broken")
    assert line["trace"].startswith("Traceback")


def test_a_reader_that_stalls_stops_nobody_and_what_was_dropped_is_counted(monkeypatch):
    monkeypatch.setattr(event_log, "_MAX_WAITING", 5)
    stream = Stalled()
    with json_log("info", stream):
        started_s = time.monotonic()
        for number in range(100):
            log_event(logging.INFO, "request", number=number)
        assert time.monotonic() - started_s < 1
        stream.go.set()
        while len(lines_of(stream)) < 5:
            time.sleep(0.001)
        log_event(logging.INFO, "last")
    *lines, last = lines_of(stream)
    assert last["event"] == "last"
    assert len(lines) + sum(line.get("lines_lost_before", 0) for line in (*lines, last)) == 100


def test_a_reader_that_never_reads_again_does_not_keep_the_server_from_ending(monkeypatch):
    monkeypatch.setattr(event_log, "_MAX_WAITING", 2)
    stream = Stalled()
    started_s = time.monotonic()
    with json_log("info", stream, timeout_s=0.1):
        for _ in range(5):
            log_event(logging.INFO, "request")
    assert time.monotonic() - started_s < 2
    stream.go.set()


def test_lines_that_are_no_json_do_not_stand_between_and_logging_is_afterwards_as_it_was(caplog):
    root, own, plain, stream = logging.getLogger(), logging.getLogger("torchdlrm.serving"), io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(plain)  # as a library that calls `logging.basicConfig` makes it
    root.addHandler(handler)
    before = [*root.handlers], own.level
    with json_log("debug", stream):
        log_event(logging.DEBUG, "request")
    assert ([*root.handlers], own.level) == before
    root.removeHandler(handler)
    assert plain.getvalue() == ""
    assert len(lines_of(stream)) == len(caplog.records) == 1


def test_events_reach_the_handlers_of_whoever_runs_the_server(caplog):
    log_event(logging.ERROR, "damaged", version="1")
    assert [(record.getMessage(), record.fields) for record in caplog.records] == [("damaged", {"version": "1"})]
