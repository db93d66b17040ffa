"""The metrics of a run over time: a line an interval in metrics.jsonl, and the same for trackers."""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from torchdlrm.errors import Interrupted
from torchdlrm.training.run import METRICS_NAME, write_atomically
from torchdlrm.training.trackers import Outcome, Tracker

_STOPPED = (Interrupted, KeyboardInterrupt)
logger = logging.getLogger("torchdlrm")


class MetricsLog:
    """Appends to the metrics of a run, inside a `with`: whatever ends it, what was buffered reaches disk and trackers.

    Args:
        run_path: the run's folder.
        from_step: where the run goes on; what an interrupted process has written beyond it is removed.
        trackers: are told as well; closed with this.
    """

    def __init__(self, run_path: Path, *, from_step: int, trackers: Sequence[Tracker] = ()) -> None:
        path = run_path / METRICS_NAME
        if path.exists():
            _keep_until(path, from_step)
        self._file = path.open("a", encoding="utf-8")
        self._trackers = trackers

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; it holds `step` and `split`. NaN becomes null, which JSON knows."""
        clean = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in line.items()}
        try:
            self._file.write(json.dumps({**clean, "time": time.time()}) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk must not end a training
            logger.warning("the metrics of step %d could not be written: %s", line["step"], error)
        values = {
            f"{line['split']}/{key}": value
            for key, value in clean.items()
            if key not in {"step", "split", "rows"} and value is not None
        }
        for tracker in self._trackers:
            tracker.log(line["step"], values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        outcome: Outcome = "finished" if kind is None else "interrupted" if issubclass(kind, _STOPPED) else "failed"
        with ExitStack() as closing:  # all of them, also when one cannot be closed
            for tracker in self._trackers:
                closing.callback(tracker.close, outcome)
            with suppress(OSError):
                self._file.close()


def _keep_until(path: Path, step: int) -> None:
    """Drop lines beyond `step`, and a last line that was cut short."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(f"{line}\n" for line in kept))
