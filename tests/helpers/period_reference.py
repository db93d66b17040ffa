"""What values come and go, in plain Python: the rules of docs/preprocessing.md, to compare with."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field


@dataclass
class Vocabulary:
    """A feature after a period.

    Attributes:
        rows: of each value with an id: count, id, first and last period.
        candidates: of each value without an id: rows by period.
        num_embeddings: of its table.
        reset: ids that stand for another value than in the period before.
        admitted: how many values got an id in this period.
        expired: how many lost theirs.
    """

    rows: dict = field(default_factory=dict)
    candidates: dict = field(default_factory=dict)
    num_embeddings: int = 1
    reset: list = field(default_factory=list)
    admitted: int = 0
    expired: int = 0

    @property
    def asked(self):
        """value, period, rows of the candidates, by value and period."""
        counts = ((value, of, count) for value, rows in self.candidates.items() for of, count in rows.items())
        return sorted(counts, key=lambda row: (by_value(row[0]), row[1]))

    @property
    def table(self):
        """value, count, id, first period, last period, by id."""
        return sorted(((value, *row) for value, row in self.rows.items()), key=lambda row: row[2])


def by_value(value):
    """A missing value sorts before all others."""
    return () if value is None else (value,)


def next_period(before, values, period, *, min_count, expire_after=None, admit_over=1, max_embeddings=None):
    """The vocabulary after a period in whose training rows these values are."""
    seen = Counter(values)
    kept = {}
    for value, (count, number, first, last) in before.rows.items():
        last_seen = period if value in seen else last
        if expire_after is None or period - last_seen < expire_after:
            kept[value] = (count + seen[value], number, first, last_seen)
    counts = defaultdict(Counter, {value: Counter(rows) for value, rows in before.candidates.items()})
    for value, count in seen.items():
        if value not in before.rows:
            counts[value][period] += count
    window = {
        value: {of: count for of, count in rows.items() if of > period - admit_over} for value, rows in counts.items()
    }
    new = [value for value, rows in window.items() if period in rows and sum(rows.values()) >= min_count]
    new.sort(key=lambda value: (-sum(window[value].values()), by_value(value)))
    if max_embeddings is not None:
        ranked = [((-last, -count, 0, number), value) for value, (count, number, _, last) in kept.items()]
        ranked += [((-period, -sum(window[value].values()), 1, i), value) for i, value in enumerate(new)]
        chosen = {value for _, value in sorted(ranked, key=lambda pair: pair[0])[: max_embeddings - 1]}
        kept = {value: row for value, row in kept.items() if value in chosen}
        new = [value for value in new if value in chosen]
    used = {number for _, number, _, _ in kept.values()}
    free = (number for number in range(1, len(kept) + len(new) + 1) if number not in used)
    rows, reset = dict(kept), []
    for value, number in zip(new, free, strict=False):
        rows[value] = (sum(window[value].values()), number, min(window[value]), period)
        if number < before.num_embeddings:
            reset.append(number)
    candidates = {
        value: asked
        for value, by_period in counts.items()
        if value not in rows
        and (asked := {of: count for of, count in by_period.items() if of > period + 1 - admit_over})
    }
    largest = max((number for _, number, _, _ in rows.values()), default=0)
    return Vocabulary(
        rows, candidates, max(before.num_embeddings, largest + 1), reset, len(new), len(before.rows) - len(kept)
    )
