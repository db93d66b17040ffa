"""Scores a log of raw rows into a file: one row out for each row in, in order, in bounded memory.

One thread reads, parses and encodes the next chunk while the model predicts the last one: neither of them keeps all
cores busy by itself.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.sample import PREDICTION_COLUMN
from torchdlrm.errors import LogError, UserError
from torchdlrm.features.bad_rows import BadRows, describe_bad_rows
from torchdlrm.features.cells import written_cells
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.metrics import BinaryMetrics, binary_metrics
from torchdlrm.prediction.predictor import Predictions, Predictor
from torchdlrm.prediction.rows_in import RowChunk, RowsIn
from torchdlrm.prediction.scores_out import LOGIT_COLUMN, check_name, writing_scores
from torchdlrm.progress import SILENT, ProgressListener

BadRowsRule = Literal["refuse", "null"]
HAS_UNKNOWN_COLUMN = "has_unknown"
_WAIT_S = 0.2
_CHUNKS_AHEAD = 2


@dataclass
class PredictSummary:
    """What came of a log.

    Attributes:
        rows: of the log, and so of the scores.
        bad_rows: of these, rows without a prediction.
        mean_prediction: over the others; None where there are none.
        unknown_rate: for each sparse feature with a vocabulary, the fraction of its rows' values without an id.
        num_never_missing: missing values of each number that was never missing in training: its mean stood for them.
        metrics: of the rows with a label, where every file has the label's column and a row has one; weighted where
            all files have a column of weights too.
        duration_s: from the first byte read to the last one written.
        details: the bad rows by reason, with their first few positions.
    """

    rows: int = 0
    bad_rows: int = 0
    mean_prediction: float | None = None
    unknown_rate: dict[str, float] = field(default_factory=dict)
    num_never_missing: dict[str, int] = field(default_factory=dict)
    metrics: BinaryMetrics | None = None
    duration_s: float = 0.0
    details: BadRows = field(default_factory=BadRows)

    @property
    def rows_per_s(self) -> float:
        """Rows of the log by the time that everything took."""
        return self.rows / self.duration_s if self.duration_s else 0.0

    def described_bad_rows(self) -> list[str]:
        """Lines for people: where the first bad rows are."""
        return describe_bad_rows(self.details.counts, self.details.examples)

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as JSON has it."""
        content = asdict(self) | {"rows_per_s": self.rows_per_s, "bad_rows_by_reason": self.details.counts}
        del content["details"]
        return content | {"metrics": None if self.metrics is None else self.metrics.as_json()}


def predict_file(
    predictor: Predictor,
    rows: RowsIn,
    out: Path,
    *,
    bad_rows: BadRowsRule = "refuse",
    bad_rows_remedy: str = "Fix the log, or let such rows have no prediction with `bad_rows` null.",
    with_details: bool = False,
    with_metrics: bool = True,
    progress: ProgressListener = SILENT,
) -> PredictSummary:
    """Predict every row of a log.

    Args:
        predictor: opened.
        rows: the log.  Its labels, where it is judged by some, are kept until the end: 5 bytes a row, 9 with weights.
        out: `.parquet`, `.csv` or `.csv.gz`, or `-`; a column `prediction`, after the passthrough columns.
        bad_rows: `refuse` stops at the first chunk with a row that cannot be read; `null` writes a row without
            prediction in its place.
        bad_rows_remedy: what helps where they are refused, as a sentence.
        with_details: write `logit`, the log-odds of the prediction, and `has_unknown`, whether a value of the row has
            no id, after it.
        with_metrics: judge the predictions by the log's labels.
        progress: shows the bytes read.

    Returns:
        What came of it.

    Raises:
        LogError: the log cannot be read, or has bad rows that are refused.
        UserError: `out` cannot be written.
        BundleError: the bundle was damaged, or its files were written to meanwhile.
    """
    check_name(out)
    if out.exists() and any(path.exists() and path.samefile(out) for path in rows.paths):
        msg = f"`out`: {out} is the log itself; name another file"
        raise UserError(msg)
    own: dict[str, pl.DataType] = {PREDICTION_COLUMN: pl.Float32()}
    if with_details:
        own |= {LOGIT_COLUMN: pl.Float32(), HAS_UNKNOWN_COLUMN: pl.Boolean()}
    for name in own:
        if name in rows.passthrough:
            msg = f"`columns`: {name} is what the scores' own column is called"
            raise UserError(msg)
    tally = _Tally(rows.schema, has_labels=with_metrics)
    started_s = time.perf_counter()
    progress.start_phase("predict", rows.size_bytes, unit="bytes")
    with writing_scores(out) as writer:
        for chunk, encoded in _encoded_ahead(predictor, rows, bad_rows_remedy if bad_rows == "refuse" else None):
            predictions = predictor.predict_encoded(encoded)
            tally.add(chunk, encoded, predictions)
            scores: dict[str, NDArray[Any]] = {PREDICTION_COLUMN: predictions.probabilities}
            if with_details:
                scores |= {LOGIT_COLUMN: predictions.logits, HAS_UNKNOWN_COLUMN: _has_unknown(predictor, encoded)}
            writer.write(_scores(chunk, scores, rows, as_text=out.suffix != ".parquet"))
            progress.advance(chunk.num_bytes, rows=f"{tally.summary.rows:,}")
        if not tally.summary.rows:
            columns = dict.fromkeys(rows.passthrough, pl.String()) | own
            writer.write(pl.DataFrame(schema=columns))
        predictor.require_undamaged()
    return tally.finish(time.perf_counter() - started_s)


def _encoded_ahead(predictor: Predictor, rows: RowsIn, remedy: str | None) -> Iterator[tuple[RowChunk, EncodedRows]]:
    """The chunks of a log, the next ones read and encoded by a thread meanwhile; bad rows need a remedy, or none."""
    chunks = iter(rows)

    def read() -> tuple[RowChunk, EncodedRows] | None:
        chunk = next(chunks, None)
        if chunk is None:
            return None
        if chunk.bad_rows.total and remedy is not None:
            lines = describe_bad_rows(chunk.bad_rows.counts, chunk.bad_rows.examples)
            raise LogError("\n".join(["the log has rows that cannot be read", *lines, remedy]))
        return chunk, predictor.encode(chunk.frame)

    with ThreadPoolExecutor(1, "torchdlrm-read") as reader:
        ahead: deque[Future[tuple[RowChunk, EncodedRows] | None]] = deque()
        try:
            while True:
                while len(ahead) < _CHUNKS_AHEAD:
                    ahead.append(reader.submit(read))
                # By short waits: Polars' handler of Ctrl-C restarts a long one, and a stream may never say more.
                while not wait([ahead[0]], _WAIT_S).done:
                    pass
                done = ahead.popleft().result()
                if done is None:
                    return
                yield done
        finally:
            rows.is_over.set()
            reader.shutdown(wait=True, cancel_futures=True)


def _has_unknown(predictor: Predictor, rows: EncodedRows) -> NDArray[np.bool_]:
    return np.logical_or.reduce([np.zeros(rows.num_rows, np.bool_), *predictor.unknown(rows).values()])


def _scores(chunk: RowChunk, scores: Mapping[str, NDArray[Any]], rows: RowsIn, *, as_text: bool) -> pl.DataFrame:
    """The passthrough columns and the scores, with nulls in the places of bad rows."""
    columns = [_written(chunk.frame[name], rows.schema, as_text=as_text) for name in rows.passthrough]
    frame = pl.DataFrame([*columns, *(pl.Series(name, values) for name, values in scores.items())])
    if not len(chunk.bad_positions):
        return frame
    is_good = np.ones(chunk.num_rows, np.bool_)
    is_good[chunk.bad_positions] = False
    places = pl.Series(np.cumsum(is_good) - 1)
    return frame.select(pl.all().gather(places.zip_with(pl.Series(is_good), pl.Series([None], dtype=places.dtype))))


def _written(cells: pl.Series, schema: FeatureSchema, *, as_text: bool) -> pl.Series:
    """A column as a log has it; in a CSV file lists are joined."""
    column = next((column for column in schema.sparse if column.name == cells.name), None)
    if column is None:
        return cells
    cells = written_cells(cells, column)
    if column.value_separator is not None and as_text:
        return cells.cast(pl.List(pl.String)).list.join(column.value_separator)
    return cells


class _Tally:
    """Adds up the numbers of the summary."""

    def __init__(self, schema: FeatureSchema, *, has_labels: bool) -> None:
        self._schema = schema
        self._sum = 0.0
        self._num_unknown: Counter[str] = Counter()
        self._num_filled: Counter[str] = Counter()
        self._num_values: Counter[str] = Counter()
        self._has_labels = has_labels
        self._targets: list[pl.DataFrame] = []
        self._logits: list[NDArray[np.float32]] = []
        self.summary = PredictSummary()

    def add(self, chunk: RowChunk, encoded: EncodedRows, predictions: Predictions) -> None:
        """Take in a chunk and what came of it."""
        self.summary.rows += chunk.num_rows
        self.summary.bad_rows += len(chunk.bad_positions)
        for reason, count in chunk.bad_rows.counts.items():
            self.summary.details.add(reason, count, chunk.bad_rows.examples[reason])
        self._sum += float(predictions.probabilities.sum(dtype=np.float64))
        for i, column in enumerate(self._schema.sparse):
            if column.name in predictions.num_unknown:
                num_values = len(encoded.sparse[i][0]) if isinstance(encoded.sparse, tuple) else encoded.num_rows
                self._num_values[column.name] += num_values
        self._num_unknown.update(predictions.num_unknown)
        self._num_filled.update(predictions.num_filled)
        self._has_labels &= chunk.has_label
        if self._has_labels:
            targets = chunk.targets(self._schema)
            self._targets.append(targets.drop_nulls())
            self._logits.append(
                predictions.logits[targets.select(pl.all_horizontal(pl.all().is_not_null())).to_series().to_numpy()]
            )

    def finish(self, duration_s: float) -> PredictSummary:
        """The summary, when all rows are in."""
        summary = self.summary
        predicted = summary.rows - summary.bad_rows
        summary.duration_s = duration_s
        summary.mean_prediction = self._sum / predicted if predicted else None
        summary.num_never_missing = {name: count for name, count in self._num_filled.items() if count}
        summary.unknown_rate = {
            name: count / max(1, self._num_values[name]) for name, count in self._num_unknown.items()
        }
        if self._has_labels and any(map(len, self._targets)):
            # One file without weights, and all rows count the same.
            names = min((targets.columns for targets in self._targets), key=len)
            targets = pl.concat([targets.select(names) for targets in self._targets])
            summary.metrics = binary_metrics(
                targets[names[0]].to_numpy(),
                np.concatenate(self._logits),
                *(targets[name].to_numpy() for name in names[1:]),
            )
        return summary
