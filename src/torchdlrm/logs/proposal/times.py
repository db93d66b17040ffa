"""Finds the column that orders the rows in time.

In: `Facts` of all columns.  Out: the best of the columns that look like times.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import polars as pl

from torchdlrm.logs.proposal.facts import Facts, words_of

_WORDS = words_of("time timestamp date datetime ts hour event_time day dt at")
_OTHER_TIMES = words_of("birth birthday birthdate born dob expire expiry signup registration registered")
_CODES = words_of("id ids uuid key hash code index number")
# Seconds to nanoseconds since 1970, in the years 1986 to 2100, and dates written as one number (14102100 is an hour).
_EPOCHS = [(5e8 * unit, 4.1e9 * unit) for unit in (1, 1e3, 1e6, 1e9)]
_WRITTEN = ((20_000_101, 21_001_231), (2_000_010_100, 2_100_123_123), (10_010_100, 99_123_123))
_MIN_TIMES = 20
_ISO_EXAMPLE = "2024-12-31T23:55"


@dataclass(frozen=True)
class Time:
    """The time column: its place, its kind, whether a split by it leaves rows for every part, why it is the time."""

    place: int
    kind: str
    can_split: bool
    reason: str


def find_time(columns: Sequence[Facts], taken: Collection[int]) -> tuple[Time | None, dict[int, str]]:
    """The time column, if there is one, and of each other column that looks like a time why it is not.

    The best is in the order of the rows, has a name that says time, and the most values.
    """
    found, others = [], {}
    for i, facts in enumerate(columns):
        if i not in taken and facts.is_other_date:
            others[i] = f"a time, but not as ISO 8601 writes it, as in {_ISO_EXAMPLE}, so no rows are ordered by it"
            continue
        kind = None if i in taken else _kind(facts)
        if kind is None:
            continue
        if facts.num_missing or facts.num_distinct < 2:
            others[i] = f"a time, but {'missing in some rows' if facts.num_missing else 'always the same'}"
            continue
        order = facts.cells if facts.numbers is None else facts.numbers
        found.append(((order.is_sorted(), facts.name.lower() in _WORDS, facts.num_distinct, -i), i, kind, order))
    if not found:
        return None, others
    (is_sorted, *_), place, kind, order = max(found, key=lambda item: item[0])
    others |= {i: f"a time; {columns[place].name} orders the rows" for _, i, *_ in found if i != place}
    return Time(
        place, kind, _can_split(order), "the rows stand in its order" if is_sorted else "orders the rows"
    ), others


def about_dates(columns: Sequence[Facts], time: Time | None) -> list[str]:
    """What to do about dates that cannot order the rows as they are written, where nothing else does."""
    unordered = [facts for facts in columns if time is None and not set(facts.words) & _OTHER_TIMES]
    return [
        f"{facts.name} looks like a time, but is written as {facts.cells[0]}: write it as {_ISO_EXAMPLE} and give it "
        'the role time, kind "datetime", so that the latest rows are held out'
        for facts in unordered
        if facts.is_other_date
    ] + [
        f'{facts.name} may hold Unix times, such as {facts.cells[0]}: if so, give it the role time, kind "int"'
        for facts in unordered
        if _is_epoch(facts) and not facts.num_missing
    ]


def _kind(facts: Facts) -> str | None:
    words = set(facts.words)
    if words & _OTHER_TIMES:
        return None
    if facts.is_datetime:
        return "datetime"
    if facts.numbers is None or not (words & _WORDS or (_is_epoch(facts) and facts.numbers.is_sorted())):
        return None
    lowest, highest = facts.bounds
    kind = "float" if facts.integers is None else "int"
    if any(low <= lowest and highest <= high for low, high in (*_EPOCHS, *_WRITTEN)):
        return kind
    return kind if facts.num_distinct > _MIN_TIMES and facts.numbers.is_sorted() else None


def _is_epoch(facts: Facts) -> bool:
    """Whether the cells of a column of any name may be Unix times."""
    if facts.integers is None or facts.num_distinct <= _MIN_TIMES or set(facts.words) & _CODES:
        return False
    return any(low <= facts.bounds[0] and facts.bounds[1] <= high for low, high in _EPOCHS)


def _can_split(order: pl.Series) -> bool:
    """Whether the last tenth, the one before and the rest all hold rows: not so where many rows have the same time."""
    rows = order.sort()
    test_from, val_from = rows[len(rows) * 9 // 10], rows[len(rows) * 8 // 10]
    return bool(rows[0] < val_from < test_from)
