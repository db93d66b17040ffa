"""Finds how far metrics of models that have predicted the same rows differ, and how sure that is.

In: candidates, each a name and the rows that its model has predicted, or each of its models of several seeds.  Out: a
`Comparison` of each with the first one.  Cost: memory holds the rows of one model at a time; how much each row moves
each metric lies in temporary files where it is much, 4 bytes a row.

Two things scatter. Which rows there are: a difference's error is that of the differences of influences (`judged.py`),
row by row, so that rows that are hard for both models drop out. And which seed a model was trained with: where a
candidate has several, the variance of their values is added, less what the rows alone make of it, and the verdict is
about the recipe; with one it is about that model. Degrees of freedom are Welch's and Satterthwaite's, p-values those of
Student's t, corrected by Holm for how many candidates are compared with the first one.

K is the number of models of a candidate.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from tempfile import SpooledTemporaryFile

import numpy as np
from numpy.typing import NDArray

from torchdlrm.errors import ConfigError
from torchdlrm.judged import Judged, standard_error
from torchdlrm.judging.comparison import LEVEL, Comparison, Difference, Seeds, Verdict
from torchdlrm.metrics import BEST, METRICS, Metric, metrics_for
from torchdlrm.toml import did_you_mean

_IN_MEMORY_BYTES = 16 << 20


def compare_rows(candidates: Iterable[tuple[str, Iterable[Judged]]], metric: str = BEST) -> Comparison:
    """Compare candidates with the first of them.

    Args:
        candidates: two or more different names, and rows as the candidate's model has predicted them, or each of its
            models: the same N rows in the same order. Each is asked for when the one before it is done with.
        metric: the name of what the verdict is by.

    Raises:
        ConfigError: there is no such metric, or it needs groups that the rows do not have.
    """
    check_metric(metric)
    found: list[_Predicted] = []
    with ExitStack() as to_the_end:
        for name, models in candidates:
            with ExitStack() as now:
                found.append(_Predicted(name, models, to_the_end if not found else now, *found[:1]))
    first, *others = found
    if metric not in first.measures:
        msg = f"`metric`: {metric} is of rows in groups; `group` names the column that says which group a row is of"
        raise ConfigError(msg)
    differences: dict[str, dict[str, Difference]] = {one.name: {} for one in others}
    for name, measure in first.measures.items():
        raw = [one.measures[name].difference(measure, first.rows) for one in others]
        for one, before, p_value in zip(others, raw, holm([one.p_value for one in raw]), strict=True):
            verdict = _verdict(before, p_value, measure.metric)
            differences[one.name][name] = replace(before, p_value_corrected=p_value, verdict=verdict)
    groups = None if first.rows.groups is None else np.unique(first.rows.groups).size
    values = {one.name: {name: measure.values for name, measure in one.measures.items()} for one in found}
    return Comparison(metric, first.rows.labels.size, groups, values, differences)


def check_metric(name: str) -> None:
    """See that there is a metric of this name.

    Raises:
        ConfigError: there is not.
    """
    if name not in METRICS:
        raise ConfigError(f"`metric`: must be one of {', '.join(METRICS)}, not {name!r}{did_you_mean(name, METRICS)}")


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for how many there are (Holm 1979); those that are NaN do not count and stay so."""
    corrected, largest = [*p_values], 0.0
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    for done, (p, index) in enumerate(order):
        corrected[index] = largest = max(largest, min(1.0, (len(order) - done) * p))
    return corrected


def _verdict(found: Difference, p_value: float, metric: Metric) -> Verdict:
    if math.isnan(p_value):
        return Verdict.UNDEFINED
    if p_value < LEVEL:
        return Verdict.BETTER if (found.difference > 0) == (metric.better == "higher") else Verdict.WORSE
    return Verdict.NO_DIFFERENCE if max(map(abs, found.interval)) <= metric.matters else Verdict.TOO_FEW


class _Predicted:
    """A candidate while it is compared: each metric of all of its models."""

    def __init__(
        self, name: str, models: Iterable[Judged], files: ExitStack, first: "_Predicted | None" = None
    ) -> None:
        self.name, self.measures = name, dict[str, _Measure]()
        for judged in models:
            nothing = np.broadcast_to(np.float32(0), judged.labels.shape)
            self.rows = replace(judged, labels=nothing, logits=nothing)
            for metric in metrics_for(judged.groups):
                self.measures.setdefault(metric.name, _Measure(metric, files)).add(judged)
            del judged  # the next one takes its place in memory
        for measure in self.measures.values():
            measure.finish(self.rows, None if first is None else first.measures[measure.metric.name])


class _Measure:
    """A metric of a candidate: its values, and how much each row moves their mean."""

    def __init__(self, metric: Metric, files: ExitStack) -> None:
        self.metric = metric
        self.values: list[float] = []
        self._variances: list[float] = []  # by rows, of each model
        self._variance = math.nan  # by rows, of the difference from the first candidate
        self._target = metric.target if metric.better == "nearer" else None
        self._file = files.enter_context(SpooledTemporaryFile(_IN_MEMORY_BYTES))  # noqa: SIM115 - closed by its stack

    def add(self, judged: Judged) -> None:
        """Take one model's predictions."""
        value = self.metric.value(judged)
        self.values.append(value)
        if self.metric.influence is None or math.isnan(value):
            self._variances.append(math.nan)
            return
        influence, is_first = self.metric.influence(judged), len(self.values) == 1
        sign = 1.0 if self._target is None else float(np.sign(value - self._target))

        def kept(block: slice) -> NDArray[np.float64]:
            moved = sign * influence(block)
            total = moved if is_first else moved + self._total(block)
            self._file.seek(4 * block.start)
            self._file.write(total.astype(np.float32).tobytes())
            return moved

        self._variances.append(standard_error(judged, kept) ** 2)

    def finish(self, rows: Judged, first: "_Measure | None") -> None:
        """Find what scatters, now that all models are there, also in the difference from the first candidate's."""
        number = len(self.values)
        self.seeds = Seeds(number)
        if number > 1 and self._is_known:
            of_mean = standard_error(rows, self._mean) ** 2
            by_rows = max(0.0, (sum(self._variances) - number * of_mean) / (number - 1))
            self.seeds = Seeds(number, max(0.0, float(self._scores.var(ddof=1)) - by_rows), by_rows)
        if first is not None and first._is_known and self._is_known:
            self._variance = standard_error(rows, lambda block: self._mean(block) - first._mean(block)) ** 2

    def difference(self, first: "_Measure", rows: Judged) -> Difference:
        """From the first candidate, with a p-value that is not corrected, and no verdict yet."""
        from scipy.special import stdtr, stdtrit  # noqa: PLC0415 - take time to load

        value, seeds = float(self._scores.mean() - first._scores.mean()), (self.seeds, first.seeds)
        by_seeds = sum(one.own / one.number for one in seeds)
        error = math.sqrt(self._variance + by_seeds)
        count = rows.labels.size if rows.groups is None else int(rows.groups.max(initial=0)) + 1
        # A variance between seeds was estimated together with what the rows add to it.
        parts = [self._variance**2 / max(1, count - 1)]
        parts += [((one.own + one.by_rows) / one.number) ** 2 / (one.number - 1) for one in seeds if one.number > 1]
        freedom = error**4 / sum(parts) if sum(parts) else 1.0
        reach = float(stdtrit(freedom, 1 - LEVEL / 2)) * error
        p_value = 2 * float(stdtr(freedom, -abs(value) / error)) if error else float(value == 0)
        ends, errors = (value - reach, value + reach), (math.sqrt(self._variance), math.sqrt(by_seeds))
        return Difference(value, ends, *errors, p_value, p_value, Verdict.UNDEFINED, rows.labels.size, seeds)

    @property
    def _is_known(self) -> bool:
        return not math.isnan(sum(self._variances))

    @property
    def _scores(self) -> NDArray[np.float64]:
        """What is compared: the values, or how far they are from where they are to be [K]."""
        values = np.array(self.values)
        return values if self._target is None else np.abs(values - self._target)

    def _total(self, block: slice) -> NDArray[np.float64]:
        self._file.seek(4 * block.start)
        return np.frombuffer(self._file.read(4 * (block.stop - block.start)), np.float32).astype(np.float64)

    def _mean(self, block: slice) -> NDArray[np.float64]:
        return self._total(block) / len(self.values)
