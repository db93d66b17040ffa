"""Finds columns of a log by name: where the file has names, and in a text whose first line names them.

In: the names in the order of the file.  Out: the schema's columns in that order; what the schema does not name is
ignored.
"""

from collections.abc import Sequence

from torchdlrm.errors import LogError
from torchdlrm.features.columns import Column, IgnoredColumn
from torchdlrm.features.schema import FeatureSchema

_MOST_NAMES_TOLD = 100
_EXTRA = "@"  # no column of a schema is called so


def found_by_name(
    names: Sequence[str], where: str, schema: FeatureSchema, needed: Sequence[Column], reader: str
) -> list[Column | None]:
    """The column of the schema that each name is; None for a name that it does not have.

    Args:
        names: in the order of the file.
        where: for messages.
        schema: the columns.
        needed: those of them that must be there.
        reader: who needs them, for messages.

    Raises:
        LogError: a column that is needed is not there (all of them are named), or one is there twice.
    """
    known = {column.log_name: column for column in schema.columns}
    missing = [column.log_name for column in needed if column.log_name not in names]
    if missing:
        more = f" and {len(names) - _MOST_NAMES_TOLD:,} more" if len(names) > _MOST_NAMES_TOLD else ""
        msg = (
            f"{where}: has no column {', '.join(missing)}, which {reader} reads; its columns are "
            f"{', '.join(names[:_MOST_NAMES_TOLD])}{more}"
        )
        raise LogError(msg)
    read = {column.log_name for column in schema.used}
    twice = sorted({name for name in names if name in read and list(names).count(name) > 1})
    if twice:
        msg = f"{where}: names the column {', '.join(twice)} more than once, and only one of them can be meant"
        raise LogError(msg)
    return [known.get(name) for name in names]


def extra_columns(layout: FeatureSchema) -> tuple[str, ...] | None:
    """The names of a file's columns that the schema does not have; None where there are none."""
    return tuple(column.log_name for column in layout.columns if column.name.startswith(_EXTRA)) or None


def ignored(place: int, name: str) -> IgnoredColumn:
    """A column of the log that the schema does not name; any text may name one, not only what a schema allows."""
    return IgnoredColumn.model_construct(name=f"{_EXTRA}{place}", header_name=name, role="ignore")
