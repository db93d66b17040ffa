"""Predicts the same raw rows by every path, to find a skew between training and serving.

| path | from raw rows to ids | the model |
| --- | --- | --- |
| checkpoint | the dataset's vocabularies and transforms | the run's checkpoint, eager, float32 |
| rounded | the same | the same, but for embeddings rounded as the bundle stores them |
| float32 | the bundle's | as served, but computing in float32 where it would in bfloat16 |
| bundle | the same | as served |
| server | over HTTP, as JSON | as served, there |

Each is compared with the one before it, row by row: so rounding, which costs what it costs, hides nothing else.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.check import Agreement, of_arithmetic, tolerance
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.precision import Tolerance
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import LogError, RunError
from torchdlrm.exporting.checkpoint import CheckpointModel
from torchdlrm.exporting.export import open_checkpoint, trained_vocabularies
from torchdlrm.features.encode import encode
from torchdlrm.metrics import BinaryMetrics, binary_metrics
from torchdlrm.model.model_class import ModelClass, reported
from torchdlrm.prediction.client import PredictionClient
from torchdlrm.prediction.json_rows import as_json_rows
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.prediction.rows_in import RowsIn, Writing
from torchdlrm.progress import ProgressListener, watched
from torchdlrm.storage.places import located
from torchdlrm.training.environment import manifest_sha256
from torchdlrm.training.processes.library_noise import silenced_libraries
from torchdlrm.training.run import Run

_BATCH_ROWS = 1_024


@dataclass(frozen=True)
class PredictionPath:
    """A path to the predictions, and how far they are from those of the path before.

    Attributes:
        name: checkpoint, rounded, float32, bundle or server.
        agreement: with the path before; that of the first one with itself.
        allowed: what the precision explains; None for the first one.
        problem: what it does not explain, for people.
        metrics: where the log has labels.
        labels: the same path of each label but the first, by its name; a problem of one of them is one of the path.
    """

    name: str
    agreement: Agreement
    allowed: Tolerance | None
    problem: str | None
    metrics: BinaryMetrics | None
    labels: Mapping[str, "PredictionPath"] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        labels = {name: path.as_dict() for name, path in self.labels.items()}
        return {
            "name": self.name,
            **asdict(self.agreement),
            "largest_allowed": None if self.allowed is None else self.allowed.difference,
            "largest_relative_allowed": None if self.allowed is None else self.allowed.relative_difference,
            "agrees": self.problem is None,
            "metrics": None if self.metrics is None else self.metrics.as_json(),
            **({"labels": labels} if labels else {}),
        }


@dataclass(frozen=True)
class Verification:
    """How far the paths agree.

    Attributes:
        bundle: that predicts.
        run: that it was made of.
        log: files of the raw rows.
        rows: how many were predicted.
        bad_rows: of the log, which were left out.
        paths: each path, in order.
    """

    bundle: Bundle
    run: Run
    log: tuple[Path, ...]
    rows: int
    bad_rows: int
    paths: tuple[PredictionPath, ...]

    @property
    def agrees(self) -> bool:
        """Whether every path agrees with the one before."""
        return all(path.problem is None for path in self.paths)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        ways = [path.as_dict() for path in self.paths]
        return {"rows": self.rows, "bad_rows": self.bad_rows, "agrees": self.agrees, "ways": ways}


@silenced_libraries()
def verify(
    bundle: str | Path,
    dataset: Dataset | str | Path,
    rows: Sequence[Path] = (),
    *,
    run: str | Path | None = None,
    url: str | None = None,
    model_class: ModelClass | None = None,
    allow_changed_model_class: bool = False,
    max_rows: int = 10_000,
    log_format: Writing = "log",
    progress: ProgressListener | bool = True,
) -> Verification:
    """Predict the first rows of a log by all paths that there are.

    Args:
        bundle: the folder of a bundle.
        dataset: that the run of the bundle was trained on, or its folder.
        rows: files of raw rows; none: those that the dataset was made of, where they are still to be found.
        run: folder of the run that the bundle was made of; None: looked for by its name.
        url: address of a server of the bundle; None: none is asked.
        model_class: that the run was trained with, where it was one of the user's.
        allow_changed_model_class: take it though its file has changed since.
        max_rows: how many rows, at most.
        log_format: how text is written.
        progress: receives the rows done; True and False as for `train`.

    Raises:
        BundleError: there is no bundle, or it is damaged.
        RunError: the run or its checkpoint is not there any more or is damaged, or was trained on another dataset.
        LogError: the log cannot be read, or has no rows.
        UserError: the server does not answer.
    """
    encoded = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    with watched(progress) as listener, PredictionClient(url) if url is not None else nullcontext() as client:
        predictor = Predictor.open(
            located(bundle),
            model_class=model_class,
            allow_changed_model_class=allow_changed_model_class,
            progress=listener,
        )
        source = predictor.bundle.manifest.source
        if manifest_sha256(encoded) != source.dataset_sha256:
            msg = (
                f"`dataset`: {encoded.path} is not what the run of the bundle {bundle} was trained on (its "
                "dataset.json differs), so the ids do not mean the same"
            )
            raise RunError(msg)
        encoded = encoded.with_labels([label.name for label in predictor.schema.learnt])
        trained = _find_run(predictor, encoded, run)
        log = RowsIn(list(rows) or _find_log(encoded), predictor.schema, log_format)
        _, checkpoint = open_checkpoint(trained, str(source.step), listener)
        shape = trained.shape(encoded, model_class, allow_changed_model_class=allow_changed_model_class)
        model = CheckpointModel(checkpoint, shape)
        with reported(shape.architecture):
            return _verify(predictor, trained, model, encoded, log, max_rows, client, listener)


def _verify(
    predictor: Predictor,
    run: Run,
    model: CheckpointModel,
    dataset: Dataset,
    log: RowsIn,
    max_rows: int,
    client: PredictionClient | None,
    progress: ProgressListener,
) -> Verification:
    bundle = predictor.bundle
    vocabularies = trained_vocabularies(dataset, bundle)
    precisions = [record.precision for record in bundle.manifest.sparse.values()]
    in_float32 = ServedModel(bundle, "float32")
    logits: dict[str, list[NDArray[np.floating]]] = {
        name: [] for name in ("checkpoint", "rounded", "float32", "bundle", "server")
    }
    targets: list[pl.DataFrame] = []
    has_labels, bad_rows, rows_left = True, 0, max_rows
    progress.start_phase("verify", max_rows)
    for chunk in log:
        frame = chunk.frame.head(rows_left)
        rows_left -= frame.height
        bad_rows += len(chunk.bad_positions)
        has_labels &= chunk.has_label
        for start in range(0, frame.height, _BATCH_ROWS):
            part = frame.slice(start, _BATCH_ROWS)
            encoded = encode(part, dataset.schema, dataset.manifest.dense, vocabularies)
            rows = EncodedRows.from_frame(encoded, dataset.schema)
            logits["checkpoint"].append(in_float32.recalibrated(model.logits(rows), rows))
            if set(precisions) != {"float32"}:
                logits["rounded"].append(in_float32.recalibrated(model.logits(rows, precisions), rows))
            served = predictor.encode(part)
            if predictor.dense_precision != "float32":
                logits["float32"].append(in_float32.logits(served))
            logits["bundle"].append(predictor.predict_encoded(served).logits)
            if client is not None:
                probabilities = client.predict(as_json_rows(part, bundle.schema), version=bundle.version)
                logits["server"].append(_log_odds(probabilities))
            progress.advance(part.height)
        if has_labels:
            targets.append(chunk.targets(dataset.schema).head(frame.height))
        if not rows_left:
            break
    if rows_left == max_rows:
        msg = f"{', '.join(map(str, log.paths))}: no row that can be read"
        raise LogError(msg)
    joined = {name: bundle.schema.by_label(np.concatenate(pieces)) for name, pieces in logits.items() if pieces}
    known = pl.concat(targets) if has_labels else pl.DataFrame()
    of_labels = {}
    for label in predictor.labels:
        own = known.drop({*predictor.labels} - {label}, strict=False) if label in known.columns else None
        of_labels[label] = _compared({name: found[label] for name, found in joined.items()}, own, predictor)
    first, *more = of_labels
    paths = []
    for place, path in enumerate(of_labels[first]):
        labels = {label: of_labels[label][place] for label in more}
        problems = (f"{label}: {of.problem}" for label, of in labels.items() if of.problem is not None)
        paths.append(replace(path, labels=labels, problem=path.problem or next(problems, None)))
    return Verification(bundle, run, tuple(log.paths), max_rows - rows_left, bad_rows, tuple(paths))


def _compared(
    logits: dict[str, NDArray[np.floating]], targets: pl.DataFrame | None, predictor: Predictor
) -> tuple[PredictionPath, ...]:
    manifest = predictor.bundle.manifest
    allowed = {
        "rounded": tolerance([record.precision for record in manifest.sparse.values()], "float32"),
        "float32": of_arithmetic("float32"),
        # The same embeddings: only the arithmetic may differ, of other batches or on another machine.
        "bundle": of_arithmetic(manifest.dense_precision),
        "server": of_arithmetic(manifest.dense_precision),
    }
    paths = []
    # The rows that tell what came of them; the others are compared all the same.
    is_labelled = None if targets is None else targets.select(pl.all_horizontal(pl.all().is_not_null())).to_series()
    before = logits["checkpoint"]
    for name, found in logits.items():
        agreement, metrics = Agreement.of(before, found), None
        problem = None if name == "checkpoint" else agreement.problem(allowed[name], same_tables=name != "rounded")
        if targets is not None and is_labelled is not None and is_labelled.any():
            labels, *weights = (column.to_numpy() for column in targets.filter(is_labelled))
            metrics = binary_metrics(labels, found[is_labelled.to_numpy()], *weights)
        paths.append(PredictionPath(name, agreement, allowed.get(name), problem, metrics))
        before = found
    return tuple(paths)


def _log_odds(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = np.clip(probabilities, 1e-300, 1.0 - 1e-16)
    return np.log(inside) - np.log1p(-inside)


def _find_run(predictor: Predictor, dataset: Dataset, run: str | Path | None) -> Run:
    """The run of a bundle: at `run`, or by its name in the folder of the bundle, of the dataset, or here."""
    if run is not None:
        return Run.open(run)
    name = predictor.bundle.manifest.source.run
    folders = [predictor.bundle.path.resolve().parent, dataset.path.resolve().parent, Path()]
    if (found := Run.find(name, folders)) is not None:
        return found
    where = ", ".join(str(folder / name) for folder in folders)
    msg = f"the bundle was made of a run called {name!r}, and none is at {where}; say where it is with `run`"
    raise RunError(msg)


def _find_log(dataset: Dataset) -> Sequence[Path]:
    """The files of the log that a dataset was made of, in its folder or here; the last one is named first.

    The manifest knows their names and sizes: a file of another size is another file.
    """
    sources = dataset.manifest.source[::-1]
    for folder in (dataset.path.resolve().parent, Path()):
        places = [(folder / source.name, source.size_bytes) for source in sources]
        found = [path for path, size_bytes in places if path.is_file() and path.stat().st_size == size_bytes]
        if found:
            return found
    listed = ", ".join(source.name for source in sources)
    msg = (
        f"{dataset.path}: the log that the dataset was made of ({listed}) is neither next to it nor here, or has "
        "changed; name a log with raw rows after the bundle"
    )
    raise LogError(msg)
