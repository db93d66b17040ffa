"""Writes docs/images/: `python -m website.pictures`, or `make docs`. A test compares what is there with it."""

from pathlib import Path

from website.charts import CHARTS
from website.diagrams import DIAGRAMS

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def pictures() -> dict[str, str]:
    """The text of each picture by its name."""
    return {f"{name}.svg": draw() for name, draw in (DIAGRAMS | CHARTS).items()}


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, text in pictures().items():
        (IMAGES / name).write_text(text)
