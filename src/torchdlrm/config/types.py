"""Types of settings that several sections have, and what all sections are."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A section of a config: frozen, and without unknown keys."""

    # Strict, so that "2048" or 2048.0 in a file is an error and not a guess; tuples come as TOML lists.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def changed_settings(section: BaseModel) -> Iterator[tuple[str, object]]:
    """The settings of a section that have other values than their defaults, by name."""
    for name, field in type(section).model_fields.items():
        if (value := getattr(section, name)) != field.default:
            yield name, value
