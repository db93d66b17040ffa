"""Gets predicted rows whose labels are known: the one way for all that judges, compares or explains.

| source | its rows |
| --- | --- |
| a run, or its folder | a split of its dataset, predicted by a checkpoint on all ranks |
| a bundle, or its folder | the same, predicted as served |
| the folder of a period of a live model | its log, as the model before predicted it |
| a .parquet, .csv or .csv.gz file | as `dlrm evaluate --predictions`, `dlrm predict --columns` or others wrote them |

Out: `PredictedRows`, in the order of the split or the file, whatever predicted them.  Cost: 5 bytes a row, and 4 more
each for weights and groups.  A file needs no torch.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from torchdlrm.bundle.sample import PREDICTION_COLUMN
from torchdlrm.config import DeviceChoice, ShardingConfig
from torchdlrm.errors import ConfigError, LiveError, UserError
from torchdlrm.folders import kind_of, wrong_folder
from torchdlrm.judged import Judged
from torchdlrm.prediction.scores_out import FILE_ENDINGS, LOGIT_COLUMN, writing_scores
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.storage import mirror, places
from torchdlrm.toml import did_you_mean

if TYPE_CHECKING:
    from torchdlrm.bundle.bundle import Bundle
    from torchdlrm.data.dataset import Dataset
    from torchdlrm.model.model_class import ModelClass
    from torchdlrm.training.run import Run

SourceKind = Literal["run", "bundle", "period", "file"]
# What each can be asked besides columns and group.
TAKES: Mapping[SourceKind, Sequence[str]] = {
    "run": ("dataset", "split", "checkpoint", "sharding", "label"),
    "bundle": ("dataset", "split", "label"),
    "period": ("label",),
    "file": ("label", "weight"),
}
SCORES_NAME = "scores.parquet"  # in the folder of a period
OWN_COLUMNS = ("row", "label", "weight", PREDICTION_COLUMN, LOGIT_COLUMN)
# Of the rows, at most, those whose group is not known: they are no group.
MOST_UNKNOWN = 0.01


@dataclass(frozen=True)
class PredictedRows:
    """N rows in the order of their split or file.

    Attributes:
        name: what people call them by: the name of the folder or the file.
        judged: labels (uint8), logits (float32), perhaps weights (float32) and groups (int32 or uint32), [N] each.
        columns: those that were asked for, by these names, N rows; none where none was. As the log has them: of a
            dataset, categories are text (null is missing, `split_rows.UNKNOWN_VALUE` has no id), and numbers are
            numbers, where what stands for a missing one takes its place.
        rows: which rows these are: sha256 of labels and weights, so equal where two are comparable, wherever they come
            from.
        about: what else is known: `label`, and of a run or a bundle `split`, `step` and `checkpoint`.
        others: the same rows with the other labels that the model has learnt, by name.
    """

    name: str
    judged: Judged
    columns: pl.DataFrame
    rows: str
    about: Mapping[str, Any]
    others: Mapping[str, Judged] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, judged: Judged, columns: pl.DataFrame, about: Mapping[str, Any]) -> "PredictedRows":
        """These rows, with what identifies them."""
        sha256 = hashlib.sha256(np.ascontiguousarray(judged.labels, np.uint8).data)
        if judged.weights is not None:
            sha256.update(np.ascontiguousarray(judged.weights, np.float32).data)
        return cls(name, judged, columns, sha256.hexdigest(), about)


def kind_of_source(source: Path) -> SourceKind:
    """What is at a path that has predicted rows, or can.

    Raises:
        UserError: nothing of the kind; of the class that belongs to what is there.
    """
    mirror.fetch(source, ("", SCORES_NAME, "period.json"))
    if source.is_file() and source.name.endswith(FILE_ENDINGS):
        return "file"
    if source.suffix and not source.exists():
        beside = [path.name for path in source.parent.iterdir()] if source.parent.is_dir() else []
        raise UserError(f"{source}: there is no such file{did_you_mean(source.name, beside)}")
    if (source / SCORES_NAME).is_file():
        return "period"
    if (source / "period.json").is_file():
        raise LiveError(f"{source}: is the first period of a live model: its log was not predicted; give the run in it")
    kind = kind_of(source)
    if kind is None or kind.name not in {"run", "bundle"}:
        raise wrong_folder(source, "run")
    return "run" if kind.name == "run" else "bundle"


@dataclass(frozen=True)
class Asked:
    """What is asked of a source, as for `torchdlrm.evaluate`; what its kind does not take has to be as it is here.

    Attributes:
        columns: of the log, by its name or the schema's; of a file its own.
        split: the rows of several joined by + stand one after the other.
    """

    dataset: "Dataset | str | Path | None" = None
    split: str = "test"
    columns: Sequence[str] = ()
    group: str | None = None
    label: str | None = None
    weight: str | None = None
    checkpoint: str = "best"
    model_class: "ModelClass | None" = None
    allow_changed_model_class: bool = False
    batch_size_global: int = 8192
    device: DeviceChoice = "auto"
    sharding: ShardingConfig | None = None

    def without(self, names: Iterable[str]) -> "Asked":
        """The same, but for these."""
        return replace(self, **{name: getattr(Asked, name) for name in names})


def predicted_rows(
    source: "Run | Bundle | str | Path", asked: Asked = Asked(), progress: ProgressListener = SILENT
) -> PredictedRows | None:
    """Predicted rows of a source; on ranks other than 0 None.

    Args:
        source: a run, a bundle, the folder of a period of a live model, or a file.
        asked: of it.
        progress: receives the rows done.

    Raises:
        UserError: as `torchdlrm.evaluate`.
    """
    if isinstance(source, str | Path):
        source = places.located(source)
    kind = kind_of_source(source) if isinstance(source, Path) else "run" if hasattr(source, "checkpoints") else "bundle"
    for name in sorted({name for names in TAKES.values() for name in names} - {*TAKES[kind]}):
        if getattr(asked, name) != getattr(Asked, name):
            raise ConfigError(f"`{name}`: is not for a {kind}, which {source} is")
    if isinstance(source, Path) and kind == "period":
        names = pl.scan_parquet(source / SCORES_NAME).collect_schema().names()
        first, *more = names[: names.index(PREDICTION_COLUMN)]  # the labels, and perhaps the weight
        weights = [name for name in more if f"{LOGIT_COLUMN}_{name}" not in names]
        return _rows_of_file(source / SCORES_NAME, source.name, asked, asked.label or first, *weights)
    if isinstance(source, Path) and kind == "file":
        return _rows_of_file(source, source.name, asked, asked.label or "label", asked.weight)
    from torchdlrm.evaluation.split_rows import rows_of_bundle, rows_of_run  # noqa: PLC0415 - with torch

    model: Any = source  # of its kind
    return (rows_of_bundle if kind == "bundle" else rows_of_run)(model, asked, progress)


def _rows_of_file(path: Path, name: str, asked: Asked, label: str, weight: str | None = None) -> PredictedRows:
    """The rows of a file that have a label, a prediction, and a weight where there is such a column."""
    columns, group = asked.columns, asked.group
    try:
        lazy = pl.scan_parquet(path) if path.suffix == ".parquet" else pl.scan_csv(path, infer_schema_length=None)
        there = lazy.collect_schema().names()
        weight = "weight" if weight is None and "weight" in there else weight
        scores = (f"{LOGIT_COLUMN}_{label}", f"{PREDICTION_COLUMN}_{label}", LOGIT_COLUMN)  # of several labels
        score = next((column for column in scores if column in there), PREDICTION_COLUMN)
        wanted = [("label", label), ("weight", weight), ("group", group), ("", score)]
        for argument, column in [*wanted, *(("", column) for column in columns)]:
            if column and column not in there:
                what = f"`{argument}`: " if argument else ""
                msg = f"{what}{path} has no column {column!r}; it has {', '.join(there[:30])}; name one of these"
                raise UserError(msg)
        clicked, scored = pl.col(label).cast(pl.Float64), pl.col(score).cast(pl.Float64)
        is_wrong = ~clicked.is_in([0.0, 1.0])
        if score.startswith(PREDICTION_COLUMN):
            is_wrong |= (scored < 0) | (scored > 1)
            scored = scored.clip(1e-300, 1 - 1e-16)
            scored = scored.log() - (-scored).log1p()
        numbered = lazy.select(label, score).with_row_index("")
        for row in numbered.filter(is_wrong).head(1).collect().iter_rows():
            msg = f"{path}, row {row[0]:,}: {label} is {row[1]}, {score} is {row[2]}; a label is 0 or 1, "
            msg += f"a prediction from 0 to 1, and its log-odds would be called {LOGIT_COLUMN}"
            raise UserError(msg)
        lazy = lazy.drop_nulls([of for of in (label, score, weight) if of is not None])
        own = [clicked.cast(pl.UInt8).alias("label"), scored.cast(pl.Float32).alias("score")]
        own += [] if weight is None else [pl.col(weight).cast(pl.Float32).alias("weight")]
        value = pl.col(group or label).cast(pl.String).cast(pl.Categorical(pl.Categories.random()))
        own += [] if group is None else [value.to_physical().alias("group")]
        found = lazy.select(own).collect(engine="streaming")
        if group is not None:
            if (lacking := found["group"].null_count()) > MOST_UNKNOWN * found.height:
                msg = f"`group`: {group} is missing in {lacking:,} of {found.height:,} rows, which are no group"
                raise UserError(msg)
            last = pl.col("group").max()
            found = found.with_columns(pl.col("group").fill_null(last + 1).cast(pl.Int32))
        optional = (found[name].to_numpy() if name in found.columns else None for name in ("weight", "group"))
        judged = Judged.of(found["label"].to_numpy(), found["score"].to_numpy(), *optional)
        raw = lazy.select(columns).collect(engine="streaming") if columns else pl.DataFrame()
    except UserError:
        raise
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    return PredictedRows.of(name, judged, raw, {"label": label})


def write_predictions(rows: PredictedRows, out: Path) -> None:
    """Write rows to a .parquet, .csv or .csv.gz file: `OWN_COLUMNS`, behind `row` the columns that were asked for.

    Behind them stand, by their names, the other labels and what is predicted of them.

    Raises:
        UserError: the name asks for no format, or cannot be written to; or another label has the name of such a column.
    """
    for name in {*rows.others} & {*OWN_COLUMNS}:
        msg = f"`predictions`: {name} is a label, and what a column of the file's own is called; give `label` = {name}"
        raise UserError(msg)
    with writing_scores(out, "predictions") as writer:
        for block in [*rows.judged.blocks()] or [slice(0, 0)]:
            own = [pl.Series("row", np.arange(block.start, block.stop)), *rows.columns[block]]
            for label, judged in {"": rows.judged, **rows.others}.items():
                logits = judged.logits[block].astype(np.float64)
                values = {
                    label or "label": judged.labels[block].astype(np.int8),
                    "weight": None if label or judged.weights is None else judged.weights[block],
                    f"{PREDICTION_COLUMN}_{label}": np.exp(-np.logaddexp(0.0, -logits)).astype(np.float32),
                    f"{LOGIT_COLUMN}_{label}": logits.astype(np.float32),
                }
                own += [pl.Series(name.removesuffix("_"), of) for name, of in values.items() if of is not None]
            writer.write(pl.DataFrame(own))
