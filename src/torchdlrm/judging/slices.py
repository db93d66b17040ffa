"""Judges slices of predicted rows, such as those that have one value of a column: on which is a model worse?

In: `Judged` of N rows, and columns of the log for them (Polars, N rows).  Out: `Slice`s, the one that is most surely
worse first.  Cost: for each way to slice one sort of N small integers, and the metrics of N rows.

Of many slices some look bad by chance, so p-values are corrected for how many there are (Holm 1979): where no slice is
bad, one is marked in at most 5 % of cases. Slices of few rows or clicks are not judged.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.errors import ConfigError
from torchdlrm.judged import Estimate, Judged, interval
from torchdlrm.judging.comparison import LEVEL
from torchdlrm.judging.paired import holm
from torchdlrm.judging.reliability import rows_of
from torchdlrm.metrics import CLICK_RATE, METRICS, Metric, metrics_in
from torchdlrm.units import show_number, show_p_value

MIN_ROWS, MIN_CLICKS = 200, 30  # of a slice; as many clicks, and other rows, as the click rate of all rows makes expect
MOST_SLICES = 20  # of a way to slice, besides all other rows
_QUANTILES, _CROSSED_QUANTILES = 10, 4

_Floats = NDArray[np.float64]
_Places = NDArray[np.uint8]


@dataclass(frozen=True)
class Slice:
    """Rows that have something in common, as `name` says, and how well they are predicted.

    Attributes:
        share: of all rows.
        estimates: `click_rate` and the metrics of the place `table`, or their differences; NaN where rows are too few.
        worst: the metric by which they are most surely predicted worse.
        z: by how many standard errors.
        p_value: how often chance makes any slice of as many seem that bad.
        before: the same slice of the rows that a drift starts from.
    """

    name: str
    rows: int
    share: float
    estimates: Mapping[str, Estimate]
    worst: str = ""
    z: float = -math.inf
    p_value: float = 1.0
    before: "Slice | None" = None

    def as_json(self) -> dict[str, Any]:
        """Of plain types: estimates by name, and their `intervals`; None where something is not known."""
        found = {**vars(self), **{name: of.value for name, of in self.estimates.items()}}
        found = {name: None if isinstance(of, float) and not math.isfinite(of) else of for name, of in found.items()}
        estimates = found.pop("estimates").items()
        intervals = {name: of.ends for name, of in estimates}
        before = self.before and self.before.as_json()
        return {**found, "is_worse": self.p_value < LEVEL, "intervals": intervals, "before": before}


def columns_of(by: str) -> list[str]:
    """The columns of `cat_5,int_2,cat_5*int_2`, each once."""
    return list(dict.fromkeys(name.strip() for name in by.replace("*", ",").split(",") if name.strip()))


def slices(
    judged: Judged,
    columns: pl.DataFrame,
    by: str,
    *,
    first: Judged | None = None,
    before: tuple[Judged, pl.DataFrame] | None = None,
) -> list[Slice]:
    """Slices of rows, those first that are most surely predicted worse: by NE, or as calibration is not 1.

    NE is compared with its mean over the other slices of the column, by their rows, as if no group were in several.

    Args:
        judged: N rows.
        columns: of these rows, as the log has them [N].
        by: columns, and crossed ones, as in `cat_5,int_2,cat_5*int_2`. A column of numbers of which more than 20 differ
            is cut at its quantiles, any other one into its most frequent values; missing is a value.
        first: another model of the same rows: metrics are differences from its, and NE is compared with its.
        before: other rows, which say how columns are cut: each slice is compared with the same slice of these.

    Raises:
        ConfigError: a column holds several values in a cell.
    """
    metrics = [m for m in metrics_in("table") if m.is_relative and (first is None or m.target is None)]
    found: list[Slice] = []
    for way in filter(None, dict.fromkeys("*".join(columns_of(way)) for way in by.split(","))):
        names, place = _cut(way, *(before or (judged, columns)))
        parts = _measured(names, place(columns), judged, first)
        earlier = _measured(names, place(before[1]), before[0]) if before else []
        with np.errstate(all="ignore"):
            zs = np.array([_z(metric, parts, earlier, is_difference=first is not None) for metric in metrics])
        zs[~np.isfinite(zs)] = -math.inf
        for part, was, z in zip_longest(parts, earlier, zs.T):
            p_value = min(1.0, len(metrics) * math.erfc(z.max() / math.sqrt(2)))
            if part.rows or (was and was.rows):
                by_metric = {"worst": metrics[z.argmax()].name, "z": float(z.max())}
                found.append(replace(part, **by_metric, p_value=p_value, before=was))
    corrected = zip(found, holm([part.p_value for part in found]), strict=True)
    return sorted((replace(part, p_value=p_value) for part, p_value in corrected), key=lambda part: -part.z)


def slice_table(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A line for each slice, in the form of `as_json`, as text by column: for terminals and pages."""

    def cell(part: Mapping[str, Any], name: str) -> str:
        low, high = part["intervals"][name] or (0.0, 0.0)
        # As many digits as the interval gives meaning to.
        digits = min(6, max(3, 1 - math.floor(math.log10((high - low) / 2)))) if high > low else 3
        value, before = show_number(part[name], digits), part["before"]
        return f"{show_number(before[name], digits)} → {value}" if before else f"{value} ±{(high - low) / 2:.{digits}f}"

    return [
        {
            "slice": part["name"],
            "rows": f"{part['rows']:,}",
            **{metric.label: cell(part, metric.name) for metric in _shown()},
            "p": show_p_value(part["p_value"]),
            "worse by": METRICS[part["worst"]].label if part["is_worse"] else "",
        }
        for part in found
    ]


def _shown() -> list[Metric]:
    return [CLICK_RATE, *metrics_in("table")]


def _z(metric: Metric, parts: Sequence[Slice], earlier: Sequence[Slice], *, is_difference: bool) -> _Floats:
    """By how many standard errors each slice is worse than what it is compared with [slices]."""
    bad, error = _badness(metric, parts)
    if earlier:
        was, was_error = _badness(metric, earlier)
        return (bad - was) / np.hypot(error, was_error)
    if is_difference or metric.target is not None:
        return bad / error
    rows = np.where(np.isfinite(error), [part.rows for part in parts], 0)
    others, total, squares = (np.nansum(of) - of for of in (rows, rows * bad, (rows * error) ** 2))
    return (bad - total / others) / np.hypot(error, np.sqrt(squares) / others)


def _badness(metric: Metric, parts: Sequence[Slice]) -> tuple[_Floats, _Floats]:
    """What is larger where predictions are worse, and its standard error [slices]."""
    value, error = np.array([part.estimates[metric.name][:2] for part in parts]).T
    if metric.target is None:
        return -value if metric.better == "higher" else value, error
    # A ratio to the click rate, which is nearer to normal as an angle where few rows are clicked, or few are not.
    rate = np.array([part.estimates["click_rate"].value for part in parts])
    angle = np.abs(np.arcsin(np.sqrt(rate * value / metric.target)) - np.arcsin(np.sqrt(rate)))
    return 2.0 * angle * np.sqrt((1.0 - rate) / rate), error / value


def _cut(way: str, judged: Judged, columns: pl.DataFrame) -> tuple[list[str], Callable[[pl.DataFrame], _Places]]:
    """The names of a way's slices, the last being all other rows; and what says which slice each row is in [N]."""
    names = columns_of(way)
    keys = [str(i) for i in range(len(names))]
    num_ranges = _QUANTILES if len(names) == 1 else _CROSSED_QUANTILES
    cells = [_cells(columns[name], num_ranges).alias(key) for name, key in zip(names, keys, strict=True)]
    counts = columns.select(cells).group_by(keys).agg(pl.len().cast(pl.Int64))
    counts = counts.filter(pl.col("len") >= _least_rows(judged)).sort(-pl.col("len"), *keys)
    frequent = counts.select(keys).head(MOST_SLICES).with_row_index("slice")
    found = [
        ", ".join(f"{name} = {'missing' if of is None else of}" for name, of in zip(names, values, strict=True))
        for _, *values in frequent.rows()
    ]

    def place(columns: pl.DataFrame) -> _Places:
        rows = columns.select(cells).join(frequent, on=keys, how="left", nulls_equal=True, maintain_order="left")
        return rows["slice"].fill_null(len(found)).cast(pl.UInt8).to_numpy()

    return [*found, f"{way} = others"], place


def _measured(names: Sequence[str], places: _Places, judged: Judged, first: Judged | None = None) -> list[Slice]:
    """The slices with their estimates, which are differences where there is a first model."""
    order, found = np.argsort(places, kind="stable"), []
    ends = np.cumsum(np.bincount(places, minlength=len(names)))
    for name, rows in zip(names, np.split(order, ends[:-1]), strict=True):
        part, was = rows_of(judged, rows), None if first is None else rows_of(first, rows)
        estimates = dict.fromkeys((metric.name for metric in _shown()), interval(math.nan, math.nan))
        for metric in _shown() if rows.size >= _least_rows(judged) else (CLICK_RATE,):
            is_alone = was is None or metric is CLICK_RATE
            estimates[metric.name] = metric.estimate(part) if is_alone else metric.difference(was or part, part)
        found.append(Slice(name, rows.size, rows.size / max(1, order.size), estimates))
    return found


def _least_rows(judged: Judged) -> float:
    rate = np.mean(judged.labels != 0) if judged.labels.size else 0.0
    return max(MIN_ROWS, MIN_CLICKS / max(min(rate, 1.0 - rate), 1e-9))


def _cells(column: pl.Series, num_ranges: int) -> pl.Expr:
    """What the cells of a column are sliced by: themselves, or a range of numbers."""
    if column.dtype.is_nested():
        raise ConfigError(f"`by`: {column.name} holds several values in a cell; slice by columns that hold one")
    cells = pl.col(column.name).fill_nan(None) if column.dtype.is_float() else pl.col(column.name)
    if not column.dtype.is_numeric() or column.n_unique() <= MOST_SLICES:
        return cells
    numbers = column.cast(pl.Float64).fill_nan(None).drop_nulls().to_numpy()
    ends = np.unique(np.quantile(numbers, np.arange(1, num_ranges) / num_ranges, method="lower"))
    step, form = (1, ",.0f") if (numbers == numbers.round()).all() else (0, ".6g")
    starts = [f"{end + step:{form}} to " if end + step < next_end else "" for end, next_end in pairwise(ends)]
    names = [f"{start}{end:{form}}" for start, end in zip(starts, ends[1:], strict=True)]
    above = pl.sum_horizontal([cells > end for end in ends], ignore_nulls=False)
    return above.cat.to(pl.Enum([f"up to {ends[0]:{form}}", *names, f"over {ends[-1]:{form}}"]))
