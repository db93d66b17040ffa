"""Scores a log of raw rows into a file: one row out for each row in, in order, in bounded memory.

One thread reads, parses and encodes the next chunk while the model predicts the last one: neither of them keeps all
cores busy by itself.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from torchdlrm import __version__
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.sample import PREDICTION_COLUMN
from torchdlrm.errors import BundleError, LogError, UserError
from torchdlrm.features.bad_rows import BadRows, describe_bad_rows
from torchdlrm.features.cells import written_cells
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.jobs.sections import Sections, write_sections
from torchdlrm.jobs.work_folder import Result, WorkFolder, remove_work, work_folder
from torchdlrm.jobs.workers import Task, start_workers
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.find import find_files
from torchdlrm.metrics import BinaryMetrics, binary_metrics
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.prediction.rows_in import RowChunk, RowsIn
from torchdlrm.prediction.scores_out import LOGIT_COLUMN, STANDARD_OUTPUT, writing_scores
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.storage.places import shown
from torchdlrm.storage.reading import read_each

BadRowsRule = Literal["refuse", "null"]
HAS_UNKNOWN_COLUMN = "has_unknown"
_LOGIT = "@logit"  # among what rows are judged by
_WAIT_S = 0.2
_CHUNKS_AHEAD = 2
# The remedy of bad rows where they are refused; whether details, metrics, and lists as text are wanted.
_How = tuple[str | None, bool, bool, bool]
# Of a chunk: its rows as they are written, what they are judged by, and what is counted.
_Scored = tuple[pl.DataFrame, pl.DataFrame | None, dict[str, Any]]


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
        labels: the same of each label but the first, by its name.
        duration_s: from the first byte read to the last one written.
        details: the bad rows by reason, with their first few positions.
    """

    rows: int = 0
    bad_rows: int = 0
    mean_prediction: float | None = None
    unknown_rate: dict[str, float] = field(default_factory=dict)
    num_never_missing: dict[str, int] = field(default_factory=dict)
    metrics: BinaryMetrics | None = None
    labels: dict[str, BinaryMetrics] = field(default_factory=dict)
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
        del content["details"], content["labels"]
        labels = {name: metrics.as_json() for name, metrics in self.labels.items()}
        content["metrics"] = None if self.metrics is None else self.metrics.as_json()
        return content | ({"labels": labels} if labels else {})


def predict_file(
    predictor: Predictor,
    rows: RowsIn,
    out: Path,
    *,
    bad_rows: BadRowsRule = "refuse",
    bad_rows_remedy: str = "Fix the log, or let such rows have no prediction with `bad_rows` null.",
    with_details: bool = False,
    with_metrics: bool = True,
    cluster: str | None = None,
    own_model: Mapping[str, Any] | None = None,
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
        cluster: address of a Dask scheduler whose workers predict a file of the log each; what they have done is kept
            beside `out` until all is, and not done again.
        own_model: with what arguments they open a bundle of a model of one's own.
        progress: shows the bytes read.

    Returns:
        What came of it.

    Raises:
        LogError: the log cannot be read, or has bad rows that are refused.
        UserError: `out` cannot be written.
        BundleError: the bundle was damaged, or its files were written to meanwhile.
    """
    if out.exists() and any(path.exists() and path.samefile(out) for path in rows.paths):
        msg = f"`out`: {out} is the log itself; name another file"
        raise UserError(msg)
    names_of = predictor.schema.label_columns
    own: dict[str, pl.DataType] = dict.fromkeys(names_of(PREDICTION_COLUMN), pl.Float32())
    if with_details:
        own |= {**dict.fromkeys(names_of(LOGIT_COLUMN), pl.Float32()), HAS_UNKNOWN_COLUMN: pl.Boolean()}
    for name in own:
        if name in rows.passthrough:
            msg = f"`columns`: {name} is what the scores' own column is called"
            raise UserError(msg)
    tally = _Tally(rows.schema)
    started_s = time.perf_counter()
    progress.start_phase("predict", rows.size_bytes, unit="bytes")
    how = bad_rows_remedy if bad_rows == "refuse" else None, with_details, with_metrics, out.suffix != ".parquet"
    job: AbstractContextManager[Iterator[_Scored]] = nullcontext(_scored(predictor, rows, how))
    if cluster is not None:
        job = _by_cluster(cluster, dict(own_model or {}), predictor, rows, out, how)
    with job as scored, writing_scores(out) as writer:
        for frame, judged, counts in scored:
            tally.add(frame, judged, counts)
            writer.write(frame)
            progress.advance(counts["num_bytes"], rows=f"{tally.summary.rows:,}")
        if not tally.summary.rows:
            columns = dict.fromkeys(rows.passthrough, pl.String()) | own
            writer.write(pl.DataFrame(schema=columns))
        predictor.require_undamaged()
    return tally.finish(time.perf_counter() - started_s)


@contextmanager
def _by_cluster(
    cluster: str, own_model: dict[str, Any], predictor: Predictor, rows: RowsIn, out: Path, how: _How
) -> Iterator[Iterator[_Scored]]:
    """As `_scored`, a file of the log being a task; of a job that was interrupted, those that are left."""
    if rows.size_bytes is None or out == STANDARD_OUTPUT:
        raise UserError("`cluster`: takes the log from files, and writes to one; name them")
    next(iter(rows), None)  # says which columns are written, of all files
    files = rows.files or find_files(rows.paths)
    reading = {name: getattr(rows, name) for name in ("log_format", "passthrough", "chunk_bytes")}
    settings = {"torchdlrm": __version__, "bundle": predictor.version, "how": how, **reading}
    settings |= {"log": [[shown(file.path), *astuple(file.identity)] for file in files]}
    with start_workers(1, cluster) as workers:
        work = WorkFolder.open(work_folder(out), settings, {}, ("scores",), is_shared=True, restart=False)
        try:
            workers.require_to_see([work.pieces, predictor.bundle.path, *(file.path for file in files)])
            bundle = predictor.bundle.path, predictor.version, own_model
            targets = [work.pieces / "scores" / f"{number:05d}" for number in range(len(files))]
            tasks = [
                Task(target.name, _predict_piece, (bundle, file, reading, how, target))
                for file, target in zip(files, targets, strict=True)
            ]
            yield (
                chunk
                for result, target in zip(workers.run(tasks, work), targets, strict=True)
                for chunk in read_each(enumerate(result["chunks"]), partial(_read_scored, Sections(target)))
            )
            workers.forget(work)
        finally:
            work.close()
    remove_work(work.path)


def _predict_piece(
    bundle: tuple[Path, str, dict[str, Any]], file: LogFile, reading: dict[str, Any], how: _How, target: Path
) -> Result:
    """Task: predict a file of a log; leaves what is written of it and what it is judged by, and returns the counts."""
    path, version, own_model = bundle
    predictor = Predictor.open(path, verify="lazy", **own_model)
    if predictor.version != version:
        msg = f"{path}: is not the bundle any more that the job began with; start it again"
        raise BundleError(msg)
    chunks = []

    def tables() -> Iterator[tuple[str, pa.Table]]:
        rows = RowsIn([file.path], predictor.schema, files=(file,), **reading)
        for number, (frame, judged, counts) in enumerate(_scored(predictor, rows, how)):
            chunks.append(counts)
            yield f"frame-{number}", frame.to_arrow()
            if judged is not None:
                yield f"judged-{number}", judged.to_arrow()

    write_sections(target, tables())
    predictor.require_undamaged()
    return {"chunks": chunks}


def _read_scored(sections: Sections, numbered: tuple[int, dict[str, Any]]) -> _Scored:
    number, counts = numbered
    names = (f"frame-{number}", f"judged-{number}")
    frame, judged = (pl.DataFrame(sections.table(name)) if name in sections else None for name in names)
    assert frame is not None, "the task has written it"
    return frame, judged, counts


def _scored(predictor: Predictor, rows: RowsIn, how: _How) -> Iterator[_Scored]:
    """The chunks of a log, predicted."""
    remedy, with_details, with_metrics, as_text = how
    for chunk, encoded in _encoded_ahead(predictor, rows, remedy):
        predictions = predictor.predict_encoded(encoded)
        by_label = predictor.schema.by_label
        scores: dict[str, NDArray[Any]] = by_label(predictions.probabilities, PREDICTION_COLUMN)
        if with_details:
            has_unknown = [np.zeros(encoded.num_rows, np.bool_), *predictor.unknown(encoded).values()]
            scores |= by_label(predictions.logits, LOGIT_COLUMN)
            scores[HAS_UNKNOWN_COLUMN] = np.logical_or.reduce(has_unknown)
        judged = None
        if with_metrics and chunk.has_label:
            logits = by_label(predictions.logits, _LOGIT)
            judged = chunk.targets(rows.schema).with_columns(pl.Series(name, of) for name, of in logits.items())
            judged = judged.drop_nulls() if len(logits) == 1 else judged
        num_values = {
            column.name: len(encoded.sparse[i][0]) if isinstance(encoded.sparse, tuple) else encoded.num_rows
            for i, column in enumerate(rows.schema.sparse)
            if column.name in predictions.num_unknown
        }
        counts = {
            "num_bytes": chunk.num_bytes,
            "bad_rows": chunk.bad_rows.to_json(),
            "sum": float(scores[PREDICTION_COLUMN].sum(dtype=np.float64)),
            "values": [num_values, predictions.num_unknown, predictions.num_filled],
        }
        yield _scores(chunk, scores, rows, as_text=as_text), judged, counts


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
        ahead = deque(reader.submit(read) for _ in range(_CHUNKS_AHEAD))
        try:
            while True:
                # By short waits: Polars' handler of Ctrl-C restarts a long one, and a stream may never say more.
                while not wait([ahead[0]], _WAIT_S).done:
                    pass
                done = ahead.popleft().result()
                if done is None:
                    return
                yield done
                ahead.append(reader.submit(read))
        finally:
            rows.is_over.set()
            reader.shutdown(wait=True, cancel_futures=True)


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
    cells = cells if column is None else written_cells(cells, column)
    if as_text and isinstance(cells.dtype, pl.List):  # a vector's numbers, too
        return cells.cast(pl.List(pl.String)).list.join(getattr(column, "value_separator", ","))
    return cells


class _Tally:
    """Adds up the numbers of the summary."""

    def __init__(self, schema: FeatureSchema) -> None:
        self._schema, self._sum = schema, 0.0
        self._values: tuple[Counter[str], ...] = Counter(), Counter(), Counter()
        self._judged: list[pl.DataFrame | None] = []
        self.summary = PredictSummary()

    def add(self, frame: pl.DataFrame, judged: pl.DataFrame | None, counts: dict[str, Any]) -> None:
        """Take in what came of a chunk."""
        bad_rows = BadRows.from_json(counts["bad_rows"])
        self.summary.rows += frame.height
        self.summary.bad_rows += bad_rows.total
        for reason, count in bad_rows.counts.items():
            self.summary.details.add(reason, count, bad_rows.examples[reason])
        self._sum += counts["sum"]
        for total, more in zip(self._values, counts["values"], strict=True):
            total.update(more)
        self._judged.append(judged)

    def finish(self, duration_s: float) -> PredictSummary:
        """The summary, when all rows are in."""
        summary = self.summary
        predicted = summary.rows - summary.bad_rows
        summary.duration_s = duration_s
        summary.mean_prediction = self._sum / predicted if predicted else None
        num_values, num_unknown, num_filled = self._values
        summary.num_never_missing = {name: count for name, count in num_filled.items() if count}
        summary.unknown_rate = {name: count / max(1, num_values[name]) for name, count in num_unknown.items()}
        judged = [frame for frame in self._judged if frame is not None]
        if not judged or len(judged) < len(self._judged):
            return summary
        # One file without weights, and all rows count the same; one without a label, and it judges nothing.
        there = set.intersection(*({*frame.columns} for frame in judged))
        weights = {*self._schema.target_names} - {label.name for label in self._schema.learnt}
        for label, logit in zip(self._schema.learnt, self._schema.label_columns(_LOGIT), strict=True):
            if label.name in there:
                names = [label.name, *(weights & there), logit]
                columns = pl.concat(frame.select(names) for frame in judged).drop_nulls()
                if columns.height:
                    labels, *weight, logits = (column.to_numpy() for column in columns)
                    summary.labels[label.name] = binary_metrics(labels, logits, *weight)
        summary.metrics = summary.labels.pop(self._schema.label.name, None)
        return summary
