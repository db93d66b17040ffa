"""Compares models on the rows of a split or a log: runs, bundles, periods of a live model and files of predictions.

In: where candidates are.  Out: a `Comparison`; `judging/` finds it.  Memory holds the rows of one model at a time.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Union

from torchdlrm.config import DeviceChoice
from torchdlrm.errors import ConfigError, DatasetError
from torchdlrm.evaluation.predictions import TAKES, Asked, PredictedRows, kind_of_source, predicted_rows
from torchdlrm.folders import kind_of
from torchdlrm.judged import Judged
from torchdlrm.judging.comparison import Comparison
from torchdlrm.judging.paired import check_metric, compare_rows
from torchdlrm.judging.slices import Slice, columns_of, slices
from torchdlrm.metrics import BEST
from torchdlrm.progress import ProgressListener, watched
from torchdlrm.storage import mirror, places

if TYPE_CHECKING:  # a comparison of files needs no torch
    from torchdlrm.bundle.bundle import Bundle
    from torchdlrm.data.dataset import Dataset
    from torchdlrm.model.model_class import ModelClass
    from torchdlrm.training.run import Run

Source = Union["Run", "Bundle", str, Path]
Named = Mapping[str, Sequence[Source]]


def compare(
    *candidates: Source | Named,
    dataset: "Dataset | str | Path | None" = None,
    split: str = "test",
    metric: str = BEST,
    by: str | None = None,
    group: str | None = None,
    label: str | None = None,
    weight: str | None = None,
    model_class: "ModelClass | None" = None,
    allow_changed_model_class: bool = False,
    device: DeviceChoice = "auto",
    progress: ProgressListener | bool = True,
) -> Comparison | None:
    """Compare models with the first of them, on the same rows.

    Works in this process and all others that torch's launcher has started with it, as `evaluate` does.

    Args:
        candidates: two or more. Each is a run, a bundle, the folder of a period of a live model, a file of predictions,
            or several of these, the models of one recipe that were trained with different seeds: a pattern such as
            `runs/wide-*`. `wide=runs/wide-*` gives it a name, and so does a mapping of names to lists of models.
        dataset: of runs and bundles, as for `evaluate`.
        split: of their dataset: `train`, `val` or `test`; several joined by + are judged together.
        metric: the name of the one that the verdict is by, as `BinaryMetrics` has it.
        by: slices on which the others may have lost, as for `evaluate`; columns are those that the first candidate has,
            and of several seeds the first model is taken.
        group: a column: rows of the same value depend on each other, as those of one user, and count as one.
        label: of runs and bundles which of their labels, and of files their column of labels, as for `evaluate`.
        weight: of files: their column of weights.
        model_class: of those runs and bundles that were trained with a model class of the user; of several,
            `FILE.py:NAME` with commas between them, each takes its own.
        allow_changed_model_class: take it though its file has changed since.
        device: where runs compute, as for `evaluate`.
        progress: receives the rows done on rank 0; True and False as for `train`.

    Returns:
        On rank 0 how the others differ from the first candidate; None elsewhere.

    Raises:
        UserError: a candidate is not there or cannot be evaluated.
        ConfigError: there are fewer than two candidates, or there is no such metric.
        DatasetError: candidates have predicted different rows.
    """
    check_metric(metric)
    named = named_sources(candidates)
    kinds = {_path(source): kind_of_source(_path(source)) for source in chain(*named.values())}
    taken = {name for kind in kinds.values() for name in TAKES[kind]}
    columns = columns_of(by) if by else ()
    asked = Asked(dataset=dataset, split=split, columns=columns, group=group, label=label, weight=weight, device=device)
    known: list[tuple[Path, int, str, str]] = []  # of each source how many rows it has, which, and by what label
    sliced = {_path(sources[0]): name for name, sources in named.items()}
    first: list[PredictedRows] = []
    lost: dict[str, list[Slice]] = {}
    labels: list[str | None] = []

    def predict(source: Source) -> PredictedRows | None:
        path = _path(source)
        # Each is for those that take it; what none does is refused.
        others = {*taken} - {*TAKES[kinds[path]]} | ({"columns"} if known else set())
        own = _model_class_of(path, model_class)
        how = replace(asked, model_class=own, allow_changed_model_class=allow_changed_model_class and own is not None)
        return predicted_rows(source, how.without(others), listener)

    def read(source: Source) -> Judged:
        path, rows = _path(source), predict(source)
        assert rows is not None, "this is rank 0"
        known.append((path, rows.judged.sums.rows, rows.rows, rows.about["label"]))
        labels.append(rows.about["label"] if rows.others else label)
        if known[0][1:3] != known[-1][1:3]:
            numbers = known[0][1], known[-1][1]
            what = "{:,} and {:,}".format(*numbers) if len({*numbers}) > 1 else "their labels or weights differ"
            if known[0][3] != known[-1][3]:
                what = f"by the labels {known[0][3]} and {known[-1][3]}; `label` names one that both have"
            raise DatasetError(
                f"{known[0][0]} and {path} were judged on different rows ({what}), so a difference would say nothing "
                "about the models; let both predict the same split of the same dataset, or the same log"
            )
        if by and first and path in sliced:
            lost[sliced[path]] = slices(rows.judged, first[0].columns, by, first=first[0].judged)
        elif by and not first:
            first.append(rows)
        return rows.judged

    with watched(progress) as listener:
        if os.environ.get("RANK", "0") != "0":  # of torch's launcher; only rank 0 is given the rows
            for source in chain(*named.values()):
                predict(source)
            return None
        # Lazily, so that the rows of one source are in memory, and with slices those of the first one.
        found = compare_rows(((name, map(read, sources)) for name, sources in named.items()), metric)
        return replace(found, slices=lost, label=labels[0])


def named_sources(candidates: Sequence[Source | Named]) -> dict[str, Sequence[Source]]:
    """The models of each candidate by its name; candidates as for `compare`.

    Raises:
        ConfigError: they are fewer than two, one is there twice, or a pattern matches nothing.
    """
    found: dict[str, Sequence[Source]] = {}
    for candidate in candidates:
        if isinstance(candidate, Mapping):
            found |= candidate
            continue
        name, sources = str(_path(candidate)), [candidate]
        if isinstance(candidate, str) and not places.located(candidate).exists():
            given, equals, pattern = candidate.partition("=")
            name, pattern = (given, pattern) if equals and "/" not in given else (name, candidate)
            mirror.fetch(places.located(pattern.partition("*")[0].rpartition("/")[0]), ())
            sources = [*sorted(glob(str(places.located(pattern))))]  # noqa: PTH207 - the pattern may be absolute
            if has_magic(pattern) and not sources:
                raise ConfigError(f"`candidates`: nothing matches {pattern}")
        found[name] = sources or [pattern]
    if len(found) < max(2, len(candidates)):
        number = max(map(len, found.values()), default=0)
        what = f"is one recipe with {number} seeds" if number > 1 else "is there alone"
        msg = f"`candidates`: two or more that differ are compared, and {', '.join(found) or 'none'} {what}"
        raise ConfigError(msg)
    return found


def _path(source: Source) -> Path:
    return places.located(source) if isinstance(source, str | Path) else source.path


def _model_class_of(path: Path, given: "ModelClass | None") -> "ModelClass | None":
    """That of a run or a bundle which was trained with a model class of the user; of several by its name."""
    kind = kind_of(path)
    record = None if kind is None else json.loads((path / kind.marker).read_text()).get("model_class")
    if record is None or not isinstance(given, str):
        return given if record else None
    name, classes = record["name"].replace(".py:", ":"), given.split(",")
    return next((one for one in classes if one.replace(".py:", ":").endswith(name)), classes[0])
