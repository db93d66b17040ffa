"""Finds the label of a log, which of its values are clicks, and which other columns give it away.

In: `Facts` of all columns, and their cells.  Out: a `Label`; and for each column that looks like it, why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from torchdlrm.logs.proposal.facts import Facts, words_of
from torchdlrm.ranks import auc

_NAMES_IN_ORDER = "label click clicked clk isclick target y conversion converted purchased purchase installed response"
_NAMES = words_of(_NAMES_IN_ORDER)
_RATINGS = words_of("rating star")
# What is no click and what is one, in lower case; numbers as `_normal` writes them.
_PAIRS = (("0", "1"), ("false", "true"), ("-1", "1"), ("no", "yes"), ("n", "y"), ("f", "t"), ("noclick", "click"))
_PLAIN_PAIRS = _PAIRS[:2]  # which a schema reads without keys
_GOOD_RATING = 0.8  # of the best one
_FEW_VALUES = 50
_MIN_ROWS = 10  # of the rarer label, by which another column can be judged
# A column gives the label away where at most this fraction of the rarer label's rows cannot be seen from it.
_UNSEEN_FRACTION = 0.1
_TELLING_AUC = 0.99


@dataclass(frozen=True)
class Label:
    """The label's column: its place, what a schema says of it, why it is the label."""

    place: int
    keys: Mapping[str, object]
    reason: str


def find_label(columns: Sequence[Facts]) -> Label | None:
    """The column that most looks like the label: by its name and its values, by its place, or alone by its values."""
    pairs = {i: pair for i, facts in enumerate(columns) if (pair := _pair_of(facts)) is not None}
    both = [i for i in pairs if columns[i].num_distinct > 1]
    named = sorted(
        (i for i in pairs if _NAMES & set(columns[i].words)), key=lambda i: (i not in both, _rank(columns[i]))
    )
    if named:
        return Label(named[0], _keys(columns[named[0]], pairs[named[0]]), "by its name and its values")
    numeric = [i for i, facts in enumerate(columns) if facts.numbers is not None and facts.num_distinct > 2]
    for names in (_NAMES, _RATINGS):
        for i in numeric:
            if names & set(columns[i].words) and len(columns[i].words) <= 2:
                threshold = _threshold(columns[i], is_rating=names is _RATINGS)
                reason = f"by its name: numbers, of which {threshold:g} and more are taken for clicks"
                return Label(i, {"threshold": threshold}, reason)
    places = [(0, "the first column, of two values"), (len(columns) - 1, "the last column, of two values")]
    if len(both) == 1:
        places.append((both[0], "the only column of two values like 0 and 1"))
    found = next((Label(i, _keys(columns[i], pairs[i]), why) for i, why in places if i in both), None)
    return found or _last_of_two_texts(columns)


def _last_of_two_texts(columns: Sequence[Facts]) -> Label | None:
    """The last column, where it has two values that say nothing by themselves, as `- 50000.` and `50000+.`."""
    if not columns or columns[-1].is_list or columns[-1].num_distinct != 2 or columns[-1].numbers is not None:
        return None
    counts = columns[-1].cells.value_counts(sort=True)
    negative, positive = counts.to_series(0)
    reason = "the last column, of two values, of which the rarer is taken for a click: is it one?"
    return Label(len(columns) - 1, {"positive": positive, "negative": negative}, reason)


def find_leaks(label: Label, columns: Sequence[Facts], frame: pl.DataFrame) -> tuple[dict[int, str], dict[int, str]]:
    """Columns that look like the label.

    Returns:
        By place, why: those that tell it, or are named so and have two values; and those that are only named so.
    """
    clicks = _clicks(label, columns[label.place], frame.to_series(label.place))
    leaks, suspects = {}, {}
    for i, facts in enumerate(columns):
        if i == label.place:
            continue
        if why := _tells(clicks, facts, frame.to_series(i)):
            leaks[i] = why
        elif _NAMES & set(facts.words) and _pair_of(facts) is not None:
            leaks[i] = 'named like a label, with two values; to learn it too, give it role = "label"'
        elif _NAMES & set(facts.words):
            suspects[i] = "named like a label: is it known before the click?"
    return leaks, suspects


def _normal(value: str) -> str:
    try:
        return f"{float(value):g}"
    except ValueError:
        return value.lower()


def _pair_of(facts: Facts) -> tuple[str, str] | None:
    """The pair that has all values of a column."""
    if facts.is_list or not 1 <= facts.num_distinct <= _FEW_VALUES:
        return None
    found = set(map(_normal, facts.cells.unique()))
    return next((pair for pair in _PAIRS if found <= set(pair)), None)


def _rank(facts: Facts) -> tuple[bool, int]:
    """Names that say nothing else before longer ones, then in the order of the names."""
    names = [i for i, name in enumerate(_NAMES_IN_ORDER.split()) if name in facts.words]
    return facts.name.lower() not in _NAMES, min(names)


def _keys(facts: Facts, pair: tuple[str, str]) -> dict[str, object]:
    if pair in _PLAIN_PAIRS:
        return {}
    texts = sorted(facts.cells.unique())
    sides = [[text for text in texts if _normal(text) == side] or [side] for side in pair]
    negative, positive = (side[0] if len(side) == 1 else side for side in sides)
    return {"positive": positive, "negative": negative}


def _threshold(facts: Facts, *, is_rating: bool) -> float:
    """A number that not all rows reach: of ratings four fifths of the best, of counts 1, else the median."""
    assert facts.numbers is not None
    lowest, highest = facts.bounds
    middle = facts.numbers.median()
    assert isinstance(middle, float)
    wanted = _GOOD_RATING * highest if is_rating else 1.0 if lowest == 0 and facts.integers is not None else middle
    values = facts.numbers.unique().sort()
    reached = values.filter((values >= wanted) & (values > lowest))
    return float(reached[0]) if len(reached) else float(highest)


def _clicks(label: Label, facts: Facts, cells: pl.Series) -> pl.Series:
    """Whether each row is a click: Boolean, null where the label is missing."""
    if "threshold" in label.keys:
        return cells.cast(pl.Float64, strict=False) >= label.keys["threshold"]
    pair = _pair_of(facts)
    if pair is None:
        return pl.Series(
            [None if cell is None or cell in facts.nulls else cell == label.keys["positive"] for cell in cells]
        )
    return pl.Series([None if cell is None or cell in facts.nulls else _normal(cell) == pair[1] for cell in cells])


def _tells(clicks: pl.Series, facts: Facts, cells: pl.Series) -> str | None:
    """How a column gives the label away, if it does."""
    rare = min(int(clicks.sum()), int((~clicks).sum()))
    if rare < _MIN_ROWS:
        return None
    is_missing = cells.is_null() | (cells.is_in(list(facts.nulls)) if facts.nulls else False)
    if _unseen(clicks, is_missing) <= _UNSEEN_FRACTION * rare:
        return "missing where the label has one value, and there where it has the other"
    if facts.is_list or not len(facts.cells):
        return None
    if (
        facts.num_distinct <= min(_FEW_VALUES, len(cells) / _MIN_ROWS)
        and _unseen(clicks, cells) <= _UNSEEN_FRACTION * rare
    ):
        return "equal to the label, or nearly"
    if facts.numbers is not None:
        numbers = cells.cast(pl.Float64, strict=False)
        both = numbers.is_finite().fill_null(value=False) & clicks.is_not_null()
        found = auc(clicks.filter(both).cast(pl.Int8).to_numpy(), numbers.filter(both).to_numpy().astype(np.float64))
        if max(found, 1 - found) > _TELLING_AUC:
            return "clicks have other numbers than all else"
    return None


def _unseen(clicks: pl.Series, values: pl.Series) -> int:
    """How many rows have the rarer label among the rows of the same value."""
    counts = pl.DataFrame({"click": clicks, "value": values}).drop_nulls("click").group_by("value")
    sums = counts.agg(pl.col("click").sum().alias("ones"), pl.len().alias("rows"))
    return int(sums.select(pl.min_horizontal("ones", pl.col("rows") - pl.col("ones")).sum()).item())
