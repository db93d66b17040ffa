"""Says what a model uses: how much worse it predicts where a feature has the values of other rows.

Permutation importance (Breiman 2001), on rows that a seed draws, so that cost and memory do not grow with the split.
Features that say the same stand in for each other, and none of them looks important: a group of them does.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import filter as matching
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.data.dataset import Dataset, rows_of_split
from torchdlrm.errors import ConfigError
from torchdlrm.evaluation.predictions import Asked, kind_of_source
from torchdlrm.evaluation.split_rows import check_columns, dataset_of
from torchdlrm.exporting.export import export
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.judged import Judged
from torchdlrm.judging.comparison import Comparison
from torchdlrm.judging.paired import compare_rows
from torchdlrm.metrics import LOSS
from torchdlrm.progress import ProgressListener, watched
from torchdlrm.storage.places import located
from torchdlrm.toml import did_you_mean
from torchdlrm.training.run import Run

Given = Dataset | str | Path | None


def importance(
    source: Run | Bundle | str | Path,
    dataset: Given = None,
    split: str = "test",
    *,
    features: Sequence[str] = ("*",),
    groups: Mapping[str, Sequence[str]] | None = None,
    max_rows: int = 100_000,
    seed: int = 0,
    checkpoint: str = "best",
    label: str | None = None,
    progress: ProgressListener | bool = True,
    **own_model: Any,
) -> Comparison:
    """Permute each feature among the rows of a split, and see what the predictions lose.

    Args:
        source: a bundle, or a run, which is exported to a temporary bundle in float32; or the folder of either.
        dataset: what it was trained on, or its folder; None where it is still where it was.
        split: `train`, `val` or `test`; several joined by + are taken together.
        features: columns of the log to look at, each by itself; with * and ? as in names of files.
        groups: columns to permute together, by the same permutation, by what to call them.
        max_rows: predict at most this many rows, drawn at random.
        seed: draws the rows and the permutation.
        checkpoint: of a run: `best` of the val split, `last`, or a step.
        label: that is judged, of several; the first when not given.
        progress: receives the rows predicted; True and False as for `train`.
        own_model: `model_class` and `allow_changed_model_class`, as for `export`.

    Returns:
        What each metric is `without NAME`, above what it is with all features. The feature that lowers the logloss most
        comes first; where the verdict is "worse" the model uses it, by more than chance.

    Raises:
        UserError: there is no such feature, or as `evaluate` and `export`.
    """
    with (
        watched(progress) as listener,
        opened(source, dataset, checkpoint, progress=listener, **own_model) as (bundle, given),
    ):
        schema, rng, rows = bundle.schema, np.random.default_rng(seed), dataset_of(bundle, given)
        names = [column.name for column in schema.features]
        compared = {"with all features": list[str]()}
        compared |= {f"without {name}": [name] for pattern in features for name in _found("features", names, pattern)}
        for group, patterns in (groups or {}).items():
            compared[f"without {group}"] = [name for pattern in patterns for name in _found("groups", names, pattern)]
        check_columns(rows, Asked(split=split, label=label))
        judged_by = label or schema.label.name
        frame, model = _drawn(rows, split, max_rows, rng), ServedModel(bundle)
        order, labels = rng.permutation(frame.height), frame[judged_by].to_numpy()
        weights = None if schema.weight is None else frame[schema.weight.name].to_numpy()
        listener.start_phase("importance", frame.height * len(compared))

        def judged(columns: Sequence[str]) -> Iterator[Judged]:
            encoded = [column.name for column in (*schema.dense, *schema.content) if column.name in columns]
            encoded += [name for of in schema.sparse if of.raw_name in columns for name in of.encoded_names]
            permuted = frame.with_columns(frame[name].gather(order) for name in encoded)
            logits = schema.by_label(model.logits(EncodedRows.from_frame(permuted, schema)))
            yield Judged.of(labels, logits[judged_by], weights)
            listener.advance(frame.height)

        result = compare_rows(((name, judged(columns)) for name, columns in compared.items()), LOSS)
    ordered = sorted(result.differences, key=lambda name: -result.differences[name][LOSS].difference)
    return replace(
        result,
        label=judged_by if schema.first_of_several else None,
        differences={name: result.differences[name] for name in ordered},
    )


@contextmanager
def opened(
    source: Run | Bundle | str | Path, dataset: Given = None, checkpoint: str = "best", **how: Any
) -> Iterator[tuple[Bundle, Given]]:
    """A bundle, of a run a temporary one in float32, and where its dataset is; `how` is that of `Bundle.open`."""
    if isinstance(source, Bundle):
        yield source, dataset
    elif not isinstance(source, Run) and kind_of_source(located(source)) == "bundle":
        yield Bundle.open(located(source), **how), dataset
    else:
        run = source if isinstance(source, Run) else Run.open(source)
        encoded, options = run.open_dataset(dataset), ExportOptions(checkpoint=checkpoint, check_rows=1_000)
        with TemporaryDirectory(prefix="torchdlrm-") as folder:
            yield export(run, Path(folder) / "bundle", options=options, dataset=encoded, **how).bundle, encoded


def _found(argument: str, names: Sequence[str], pattern: str) -> list[str]:
    found = matching(names, pattern)
    if not found:
        msg = f"`{argument}`: the model has no feature {pattern!r}{did_you_mean(pattern, names)}"
        raise ConfigError(msg)
    return found


def _drawn(dataset: Dataset, split: str, max_rows: int, rng: np.random.Generator) -> pl.DataFrame:
    """Rows of a split, each as likely as any other, in their order."""
    num_rows, frames, first = sum(dataset.splits[name].rows for name in split.split("+")), [], 0
    chosen = np.sort(rng.choice(num_rows, min(num_rows, max_rows), replace=False))
    for frame in (frame for name in split.split("+") for frame in rows_of_split(dataset, name)):
        start, stop = np.searchsorted(chosen, [first, first + frame.height])
        frames.append(frame[chosen[start:stop] - first])
        first += frame.height
    return pl.concat(frames)
