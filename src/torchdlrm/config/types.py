"""Types of settings that several sections have, and what all sections are."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def either(expected: str) -> WrapValidator:
    """Give a value that may be of several types one error, which says what is expected, in place of one for each."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            msg = f"must be {expected}, got {value!r}"
            raise ValueError(msg) from error

    return WrapValidator(validate)


class Section(BaseModel):
    """A section of a config: frozen, and without unknown keys."""

    # Strict, so that "2048" or 2048.0 in a file is an error and not a guess; tuples come as TOML lists.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
