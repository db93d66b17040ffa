"""What is known of each period of a live model: `days/0001/period.json`, and `times.json` next to it.

In: a period's folder.  Out: a `PeriodRecord`, whose bytes depend on logs and settings alone, and `StepTime`s, which
never come out the same twice.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from torchdlrm.errors import LiveError
from torchdlrm.files import write_atomically
from torchdlrm.records import Record, problems

RECORD_NAME, TIMES_NAME = "period.json", "times.json"
StepName = Literal["score", "preprocess", "learn", "export", "check", "publish"]

T = TypeVar("T")


class LogRecord(Record):
    """A file of a period's log: where it was, and what it was."""

    path: str
    size_bytes: int
    sha256: str


# By name: `rows` that were judged, those with a label; `clicks` of them; and the metrics of the place `table`, with
# `_low` and `_high` after the name for the ends of an interval of 95 %. None: not defined. A name that this version
# does not know is kept.
PeriodMetrics = dict[str, int | float | None]


class ProgressiveMetrics(Record):
    """How well the previous model predicted a log that it had not seen.

    Attributes:
        all: of all rows.
        known: of the rows whose values the model's vocabularies all have; None where there are no such rows.
        unseen: of the other rows; None where there are none.
        labels: of all rows, each label but the first, by its name.
    """

    all: PeriodMetrics
    known: PeriodMetrics | None
    unseen: PeriodMetrics | None
    labels: dict[str, PeriodMetrics] = Field({}, exclude_if=lambda labels: not labels)


class FeatureRecord(Record):
    """A sparse feature after a period.

    Attributes:
        num_embeddings: rows of its table.
        values_in_use: values that have an id; None where they are hashed, are ids already, or are counted with those of
            the feature whose table it shares.
        admitted: values that were given an id in this period.
        expired: values that lost theirs.
        unseen_fraction: of the values in this period's log, the fraction without an id in the base's vocabulary; None
            for the first period, and where there is no vocabulary.
    """

    num_embeddings: int
    values_in_use: int | None
    admitted: int
    expired: int
    unseen_fraction: float | None


class JudgedLabel(Record):
    """How a candidate predicts a label of rows that were held back from learning.

    Attributes:
        rows: which it was judged on.
        old: how the base predicted them; None for the first period.
        new: how the candidate predicts them.
        calibration_standard_error: of the candidate's calibration; None where that is not defined.
        logloss_increase: of the candidate's logloss above the base's, in nats; None for the first period.
        logloss_increase_standard_error: of the mean of the rows' differences.
    """

    rows: int
    old: PeriodMetrics | None
    new: PeriodMetrics
    calibration_standard_error: float | None
    logloss_increase: float | None
    logloss_increase_standard_error: float | None


def _judged(found: Any) -> Any:
    """A label as it is judged now; of a gate that judged by the first label alone it has the metrics, by themselves."""
    is_old = isinstance(found, dict) and "rows" in found and "new" not in found
    return dict.fromkeys(JudgedLabel.model_fields) | {"rows": found["rows"], "new": found} if is_old else found


class GateRecord(JudgedLabel):
    """Whether a candidate was good enough to be published: what it was judged by, of several labels the first.

    Attributes:
        passed: whether it was good enough, by all labels.
        reasons: sentences that say why not.
        labels: the same of each other label, by its name.
    """

    passed: bool
    reasons: tuple[str, ...]
    labels: dict[str, Annotated[JudgedLabel, BeforeValidator(_judged)]] = Field({}, exclude_if=lambda found: not found)


class PeriodRecord(Record):
    """What `period.json` holds of a period that is complete.

    Attributes:
        period: its number, from 1.
        base: the period whose model was the base: that scored the log, and learnt from it; None for the first.
        logs: the files.
        rows: of the log, without bad ones.
        clicks: of these.
        label: which of several the clicks are, and all metrics that no name stands at; empty where there is one.
        progressive: how the base predicted the log before it was learnt from; None for the first period.
        features: the sparse features by name.
        gate: whether the candidate was good enough.
        published: whether it became `current`: at once, or later by a rollback to it.
        recalibration: what it changes on held-back rows, or that it was left out; None where none was asked for.
        bundle_bytes: of the period's bundle.
        delta_bytes: of its delta to the base's bundle; None where there is none.
    """

    format: Literal["torchdlrm-period"] = "torchdlrm-period"
    # 1 had the metrics of its time, and no others; 3 has a `recalibration`, 4 several labels.
    format_version: Literal[1, 2, 3, 4] = 2
    period: int
    base: int | None
    logs: tuple[LogRecord, ...]
    rows: int
    clicks: int
    label: str = Field("", exclude_if=lambda label: not label)
    progressive: ProgressiveMetrics | None
    features: dict[str, FeatureRecord]
    gate: GateRecord
    published: bool
    recalibration: str | None = Field(None, exclude_if=lambda value: value is None)
    bundle_bytes: int
    delta_bytes: int | None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record of the period in this folder.

        Raises:
            LiveError: there is none, it is damaged, or of a newer format.
        """
        return _read(folder / RECORD_NAME, TypeAdapter(cls))

    def write(self, folder: Path) -> None:
        """Write the record to the period's folder, atomically; the same record gives the same bytes."""
        write_atomically(folder / RECORD_NAME, json.dumps(self.model_dump(mode="json"), indent=1) + "\n")


class StepTime(Record):
    """What a step took: seconds, of the attempt that completed it; and bytes of what it wrote."""

    seconds: float
    bytes: int


def read_times(folder: Path) -> dict[StepName, StepTime]:
    """What the steps of the period in this folder took, in their order; empty where nothing is known.

    Raises:
        LiveError: the file is damaged.
    """
    path = folder / TIMES_NAME
    return _read(path, TypeAdapter(dict[StepName, StepTime])) if path.exists() else {}


def write_times(folder: Path, times: Mapping[StepName, StepTime]) -> None:
    """Write what the steps of a period took, atomically."""
    content = {name: time.model_dump() for name, time in times.items()}
    write_atomically(folder / TIMES_NAME, json.dumps(content, indent=1) + "\n")


def _read(path: Path, adapter: TypeAdapter[T]) -> T:
    try:
        return adapter.validate_json(path.read_bytes())
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror}; put it back from a copy of the live model"
        raise LiveError(msg) from error
    except ValidationError as error:
        lines = [f"{path}: not what this version of torchdlrm writes; put it back from a copy", *problems(error)]
        raise LiveError("\n".join(lines)) from error
