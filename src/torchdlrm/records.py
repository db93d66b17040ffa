"""Defines what records that are read from files have in common, and says what is wrong with one.

In: JSON or TOML, which anything may have written.  Out: a record, or lines for a message.
"""

from collections.abc import Iterator, Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from torchdlrm.toml import explain


class Record(BaseModel):
    """What does not change once it is read: without unknown keys, and without contradictions."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def _contradictions(self) -> Iterator[str]:
        """What values of the right types say that cannot be, each as pydantic is to report it; the first one counts."""
        yield from ()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for problem in self._contradictions():
            raise ValueError(problem)
        return self


def problems(error: ValidationError) -> Sequence[str]:
    """One line for each problem that pydantic found: key, what is wrong, the value."""
    items = [(".".join(map(str, item["loc"])), explain(item)) for item in error.errors(include_url=False)]
    return [f"  {key}: {text}" if key else f"  {text}" for key, text in items]
