"""Judges models by rows that they have predicted: statistics alone, without torch, datasets or runs."""

from typing import Literal

# docs/judging.md says what each does.
RecalibrationMethod = Literal["platt", "isotonic", "histogram"]
