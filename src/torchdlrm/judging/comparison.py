"""Says how much better one model predicts than another, and whether that is more than noise.

In: differences of metrics on the same rows, as `paired.py` finds them.  Out: a `Comparison`, with a verdict in words.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from torchdlrm.metrics import METRICS
from torchdlrm.notebook import notebook_view
from torchdlrm.units import show_count, show_number, show_p_value

if TYPE_CHECKING:
    from torchdlrm.judging.slices import Slice

LEVEL, POWER = 0.05, 0.8  # how often a difference may be seen that is not there; and how often one that is there


class Verdict(StrEnum):
    """What is to be said of a difference."""

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference that matters"  # the whole interval is below what matters
    TOO_FEW = "too few rows to tell"
    UNDEFINED = "not defined"  # as an AUC where all labels are the same

    @property
    def brief(self) -> str:
        """As a table has room for."""
        return self.value.removesuffix(" that matters").removesuffix(" to tell")


class Seeds(NamedTuple):
    """How a metric scatters over the models of one candidate, of which there are `number`.

    `own` is its variance between seeds, were there rows without end; `by_rows` is what the rows add to it.
    """

    number: int
    own: float = 0.0
    by_rows: float = 0.0


class Needed(NamedTuple):
    """How many rows show a difference, with these models; and how many seeds of each candidate, on these rows.

    Infinite where no number does; `seeds` is None where a candidate has a single model.
    """

    rows: float
    seeds: float | None

    def __str__(self) -> str:
        ways = {"rows with these models": self.rows, "seeds of each on these rows": self.seeds}
        counts = {of: number for of, number in ways.items() if number is not None}
        return " or ".join(f"{'no number of' if math.isinf(n) else show_count(n)} {of}" for of, n in counts.items())


@dataclass(frozen=True)
class Difference:
    """How far a metric is above that of the first candidate on the same rows, as the mean over their seeds.

    Attributes:
        difference: of metrics that are to be near a target, as calibration, that of the distances from it.
        interval: where the interval of 95 % begins and ends.
        rows_error: standard error by which rows there are.
        seeds_error: standard error by which seeds the models have; 0 where each candidate has one.
        p_value: how often a difference as large is seen where there is none.
        p_value_corrected: the same, corrected for how many candidates are compared.
        verdict: what it says.
        rows: how many there are.
        seeds: of this candidate and of the first one.
    """

    difference: float
    interval: tuple[float, float]
    rows_error: float
    seeds_error: float
    p_value: float
    p_value_corrected: float
    verdict: Verdict
    rows: int
    seeds: tuple[Seeds, Seeds]

    def needed(self, difference: float, comparisons: int = 1) -> Needed:
        """What would show a true difference of this size, above 0, with a probability of 80 %.

        The level is corrected for how many comparisons are made, by Bonferroni's bound of Holm's first step.
        """
        from scipy.special import ndtri  # noqa: PLC0415 - takes time to load

        at_level = float(ndtri(1 - LEVEL / 2 / comparisons))
        variance = (difference / (at_level + float(ndtri(POWER)))) ** 2
        left = variance - self.seeds_error**2
        rows = math.ceil(self.rows * self.rows_error**2 / left) if left > 0 else math.inf
        if min(seeds.number for seeds in self.seeds) == 1:
            return Needed(rows, None)
        left = variance - max(0.0, self.rows_error**2 - sum(seeds.by_rows / seeds.number for seeds in self.seeds))
        each = sum(seeds.own + seeds.by_rows for seeds in self.seeds)
        # The last term is for Student's t in place of the normal distribution (Guenther 1981).
        return Needed(rows, max(2, math.ceil(each / left + at_level**2 / 4)) if left > 0 else math.inf)

    def shown(self, value: float, sign: str = "+") -> str:
        """A value with as many digits as the interval gives meaning to."""
        reach = (self.interval[1] - self.interval[0]) / 2
        digits = min(8, max(4, 1 - math.floor(math.log10(reach)))) if reach > 0 else 5
        return "-" if math.isnan(value) else f"{value:{sign}.{digits}f}"

    def __str__(self) -> str:
        low, high = map(self.shown, self.interval)
        p = f"p = {show_p_value(self.p_value_corrected)}".replace("= <", "< ")
        return f"{self.shown(self.difference)}, from {low} to {high}, {p}"


@dataclass(frozen=True)
class Comparison:
    """How candidates predict the same rows, each compared with the first one.

    Attributes:
        metric: the name of the metric that the verdict is by.
        rows: how many there are.
        groups: how many groups they are in, of which each counts as one observation; None where each row does.
        values: of each candidate, by its name, and of each metric, by its name: the value for each of its models.
        differences: from the first candidate of each of the others, by its name, and of each metric, by its name.
        slices: of each of the others, by its name, where they were asked for: those on which it lost first.
        label: that is judged, where there are several.
    """

    metric: str
    rows: int
    groups: int | None
    values: Mapping[str, Mapping[str, Sequence[float]]]
    differences: Mapping[str, Mapping[str, Difference]]
    slices: Mapping[str, Sequence["Slice"]] = field(default_factory=dict)
    label: str | None = None

    @property
    def verdict(self) -> str:
        """What the comparison says, by its metric, in one sentence."""
        return "; ".join(map(self.verdict_on, self.differences))

    def verdict_on(self, candidate: str) -> str:
        """What it says of one of the candidates but the first."""
        found, metric = self.differences[candidate][self.metric], METRICS[self.metric]
        one, first = map(self._called, (candidate, self._first))
        match found.verdict:
            case Verdict.NO_DIFFERENCE:
                largest = found.shown(max(map(abs, found.interval)), sign="")
                return f"no difference in {metric.label} larger than {largest} between {one} and {first}: {found}"
            case Verdict.TOO_FEW:
                enough = found.needed(metric.matters, len(self.differences))
                return (
                    f"too few rows to tell {one} from {first}: {metric.label} {found}; a difference of "
                    f"{metric.matters:g} would be seen, 4 times in 5, with {enough}"
                )
            case Verdict.UNDEFINED:
                return f"{metric.label} of {one} and {first} is not defined on these rows"
        return f"{one} is {found.verdict} than {first}: {metric.label} {found}"

    def power(self, difference: float) -> dict[str, Needed]:
        """What would show this difference of the metric, above 0, with a probability of 80 %: for each candidate."""
        number = len(self.differences)
        return {name: found[self.metric].needed(difference, number) for name, found in self.differences.items()}

    def as_json(self) -> dict[str, Any]:
        """All of it, of plain types; NaN where something is not defined."""
        pairs = [
            {
                "name": name,
                "compared_with": self._first,
                "verdict": self.verdict_on(name),
                "metrics": {
                    metric: {field: value for field, value in vars(found).items() if field not in {"rows", "seeds"}}
                    for metric, found in differences.items()
                },
                **({"slices": [part.as_json() for part in self.slices[name]]} if name in self.slices else {}),
            }
            for name, differences in self.differences.items()
        ]
        about = {"metric": self.metric, "rows": self.rows, "groups": self.groups}
        about |= {"label": self.label} if self.label else {}
        return {"verdict": self.verdict, **about, "values": self.values, "pairs": pairs}

    def table(self) -> list[dict[str, str]]:
        """A line for each metric and candidate but the first, as text by column; p-values are corrected ones."""
        rows = [
            {
                "metric": METRICS[metric].label,
                "candidate": name,
                "value": show_number(fmean(self.values[name][metric])),
                f"of {self._first}": show_number(fmean(self.values[self._first][metric])),
                "difference": found.shown(found.difference),
                "interval": " to ".join(map(found.shown, found.interval)),
                "rows ±": found.shown(found.rows_error, ""),
                "seeds ±": found.shown(found.seeds_error, ""),
                "p": show_p_value(found.p_value_corrected),
                "verdict": found.verdict.brief,
            }
            for metric in self.values[self._first]
            for name, found in ((name, of[metric]) for name, of in self.differences.items())
        ]
        idle = {"candidate"} if len(self.differences) == 1 else set()
        idle |= set() if any(self._num_seeds(name) > 1 for name in self.values) else {"rows ±", "seeds ±"}
        return [{name: text for name, text in row.items() if name not in idle} for row in rows]

    @property
    def about(self) -> str:
        """Of which rows it is."""
        groups = "" if self.groups is None else f" in {self.groups:,} groups"
        whose = next(iter(self.differences)) if len(self.differences) == 1 else "differences"
        label = f", label {self.label}" if self.label else ""
        return f"{self.rows:,} rows{groups}; {whose} against {self._first}, intervals of 95 %{label}"

    def __str__(self) -> str:
        rows = self.table()
        lines = [[*rows[0]], *([*row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([self.about, *table, f"{self.verdict}."])

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict, and each difference with its interval."""
        return notebook_view(f"{self.verdict}.", {"judged on": self.about}, self.table())

    @property
    def _first(self) -> str:
        return next(iter(self.values))

    def _num_seeds(self, name: str) -> int:
        return len(self.values[name][self.metric])

    def _called(self, name: str) -> str:
        number = self._num_seeds(name)
        return f"the model {name}" if number == 1 else f"the recipe {name} ({number} seeds)"
