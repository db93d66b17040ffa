"""Chooses the role of a column, and gives the reason.

In: `Facts` of a column that is neither the label nor a time.  Out: a `Choice`.

| cells | role |
| --- | --- |
| none, or all the same | ignore |
| of which no two are equal, unless the name says that it is a user, an item and so on | ignore: ids of the rows |
| numbers with commas, currencies or percent signs, lists in brackets | sparse: text, until they are written otherwise |
| dates and times | ignore: only one column orders the rows |
| lists of one length of numbers with fractions, also in brackets | dense: a vector |
| lists, or texts with `|` or `;` between values | sparse, several values |
| 8 hexadecimal digits | sparse hex |
| integers or floats: codes, by their name or their values | sparse |
| integers or floats: counts and amounts | dense |
| texts | sparse |
"""

from dataclasses import dataclass, field

import polars as pl

from torchdlrm.logs.proposal.facts import Facts, words_of

_LARGEST_EXACT = 2**53
_HEX = r"^[0-9a-fA-F]{8}$"
_LEADING_ZERO = r"^[+-]?0\d"
_LIST_SEPARATORS = "|;"
_LIST_FRACTION = 0.1
# What the words of a name say.
_CODES = words_of(
    "id ids code type cat category categorical class group bucket segment key hash flag kind level status"
)
_ENTITIES = words_of(
    "user item movie product ad advertiser campaign creative publisher device domain site app banner slot channel "
    "browser os platform gender sex occupation language lang zip zipcode postal country region city state brand model "
    "cookie ip member customer visitor isp carrier version uid sku host url query page store shop seller artist song "
    "book genre conn connection weekday dow month day hour position pos is has c"
)
_AMOUNTS = words_of(
    "count cnt num number amount price cost age total sum size length len duration second ms minute rate ratio score "
    "avg mean median min max view click impression visit freq frequency quantity qty value revenue balance income "
    "weight height width distance bid budget spent time since rank discount int i ctr cvr percent pct share n"
)
# Names of ids of the rows, also where a few of these stand twice.
_ROWS = words_of("id ids uuid guid row record index request impression event transaction auction log unnamed")
_NEARLY_UNIQUE = 0.9
_FEW_VALUES = 20
_MANY_VALUES = 1_000
_SMALL = 100
_LONG = 10_000
_GAPS = 3  # missing numbers for each that there is
_LONG_TAIL = 100  # times the median


@dataclass
class Choice:
    """A role for a column.

    Attributes:
        role: as a schema has it.
        reason: why, in words.
        keys: what else the column has in the schema.
    """

    role: str
    reason: str
    keys: dict[str, object] = field(default_factory=dict)


def choose_role(facts: Facts, *, is_whole_log: bool) -> Choice:
    """The role of a column that is neither the label nor a time; `is_whole_log`: whether every row was read."""
    rules = (_without_information, _as_people_write, _id_of_rows, _hexadecimal, _numbers, _several_values_as_text)
    choice = next((found for rule in rules if (found := rule(facts)) is not None), None)
    if choice is None:
        return Choice("sparse", "text", _kind(facts))
    if choice.role == "ignore" and facts.is_unique and not is_whole_log and _ENTITIES & set(facts.words):
        return Choice("sparse", "nearly every row read has a value of its own: consider hash", _kind(facts))
    return choice


def _without_information(facts: Facts) -> Choice | None:
    if facts.is_list:
        values = facts.cells.explode().drop_nulls()
        sizes = facts.cells.list.len().replace(0, None).drop_nulls().unique()
        numbers = values.cast(pl.Float64, strict=False)
        if len(sizes) == 1 and sizes[0] > 1 and not numbers.null_count() and _has_fractions(numbers):
            return Choice("dense", "a vector", {"kind": "vector", "size": sizes[0]})
        return _several_values(values, ",") if len(facts.cells) else None
    if not len(facts.cells):
        return Choice("ignore", "always missing")
    if facts.num_distinct == 1 and not facts.num_missing and facts.has_many:
        return Choice("ignore", "always the same")
    return Choice("ignore", "a time, which does not order the rows") if facts.is_datetime else None


def _as_people_write(facts: Facts) -> Choice | None:
    if facts.as_people_write is not None and facts.as_people_write[0] == "lists":
        lists = facts.cells.str.replace_all(r"[\[\]\s]", "").str.split(",")
        vector = _without_information(Facts(facts.name, lists, facts.num_rows))
        if vector is not None and vector.role == "dense":
            return vector
    return facts.as_people_write and Choice("sparse", f"{facts.as_people_write[0]}, read as text", _kind(facts))


def _id_of_rows(facts: Facts) -> Choice | None:
    is_nearly = facts.num_distinct > _NEARLY_UNIQUE * len(facts.cells) and _ROWS.issuperset(facts.words or ("",))
    if not ((facts.is_unique and _numbers_rows(facts)) or (facts.has_many and is_nearly)):
        return None
    return Choice("ignore", "every row has a value of its own, of which nothing can be learnt")


def _hexadecimal(facts: Facts) -> Choice | None:
    if facts.all_match(_HEX) and facts.integers is None:
        return Choice("sparse", "hexadecimal", {"kind": "hex"})
    return None


def _numbers(facts: Facts) -> Choice | None:
    if facts.numbers is None:
        return None
    reason = _why_code(facts)
    return Choice("sparse", reason, _kind(facts)) if reason else _amount(facts)


def _several_values_as_text(facts: Facts) -> Choice | None:
    for mark in _LIST_SEPARATORS:
        if int(facts.cells.str.contains(mark, literal=True).sum()) > _LIST_FRACTION * len(facts.cells):
            return _several_values(facts.cells.str.split(mark).explode(), mark)
    return None


def _several_values(values: pl.Series, separator: str) -> Choice:
    kind = _kind(Facts("", values.filter(values != ""), len(values)))
    return Choice(
        "sparse", f"{values.n_unique():,} different values, several a row", {**kind, "value_separator": separator}
    )


def _kind(facts: Facts) -> dict[str, object]:
    """The kind that tells all values of a sparse column apart: as numbers, 007 would be 7."""
    if facts.integers is None or facts.any_match(_LEADING_ZERO):
        return {"kind": "string"}
    return {"kind": "int"}


def _says_code(facts: Facts) -> bool | None:
    """Whether the name of a column of numbers says that they are codes, or that they are amounts (False)."""
    words = set(facts.words)
    if facts.words and facts.words[-1] in _CODES:
        return True
    return False if words & _AMOUNTS else True if words & (_CODES | _ENTITIES) else None


def _numbers_rows(facts: Facts) -> bool:
    """Whether values of which no two are equal are ids of the rows, and not amounts that happen to differ."""
    if facts.numbers is None or _has_fractions(facts.numbers):
        return facts.numbers is None
    lowest, highest = facts.bounds
    is_sorted = facts.numbers.is_sorted() or facts.numbers.is_sorted(descending=True)
    if highest - lowest + 1 == facts.num_distinct or (is_sorted and _ROWS & set(facts.words)):
        return True
    said = _says_code(facts)
    # As many numbers, drawn from such a range, would have had some equal ones.
    is_dense = len(facts.cells) ** 2 > 10 * (highest - lowest + 1)
    return said if said is not None else is_sorted or is_dense or bool(_why_code(facts))


def _has_fractions(numbers: pl.Series) -> bool:
    return bool((numbers != numbers.round()).any())


def _why_code(facts: Facts) -> str | None:
    """Why numbers are codes; None: they are amounts."""
    assert facts.numbers is not None
    if _has_fractions(facts.numbers):
        return None
    lowest, highest = facts.bounds
    said, num_distinct = _says_code(facts), facts.num_distinct
    num_gaps = highest - lowest + 1 - num_distinct
    are_few = num_distinct <= min(_MANY_VALUES, len(facts.cells) / 10)
    same_length = len(str(int(lowest))) == len(str(int(highest)))
    reasons = (
        ("a code: leading zeros", facts.any_match(_LEADING_ZERO)),
        ("a code: too large for a number of a model", max(abs(lowest), abs(highest)) >= _LARGEST_EXACT),
        ("a code by its name", said is True),
        ("a code: few values", said is None and num_distinct <= _FEW_VALUES),
        (
            "a code: few values, far apart",
            said is None and lowest >= _SMALL and are_few and num_gaps > _GAPS * num_distinct,
        ),
        ("a code: all of the same length", said is None and lowest >= _LONG and same_length),
    )
    return next((reason for reason, holds in reasons if holds), None)


def _amount(facts: Facts) -> Choice:
    """A dense column, with a transform that keeps its values apart."""
    assert facts.numbers is not None
    lowest, highest = facts.bounds
    is_whole = facts.integers is not None
    kind = "int" if is_whole and not facts.is_floating else "float"
    median = facts.numbers.median()
    assert isinstance(median, float)
    if lowest >= 0 and (is_whole or highest > _LONG_TAIL * max(median, 0.0)):
        transform, why = "log1p", "a count" if is_whole else "an amount with a long tail"
    elif is_whole and lowest >= -2 and highest > _FEW_VALUES:
        transform, why = "log_plus_3", "a count, with -1 or -2 for something"
    else:
        transform, why = "standardize", "an amount that may be negative" if lowest < 0 else "an amount"
    return Choice("dense", why, {"kind": kind, "transform": transform})
