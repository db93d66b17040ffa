"""What a user may choose of a preprocessing job: what its bytes depend on, and what it may use of the machine."""

import os
from dataclasses import dataclass
from pathlib import Path

from torchdlrm.errors import ConfigError
from torchdlrm.features.vocabulary import DEFAULT_MIN_COUNT

PART_ROWS = 1 << 20
DEFAULT_MEMORY_BYTES = 4 << 30
# Python with Polars and PyArrow loaded, before it has read a byte.
BASE_BYTES = 160 << 20


@dataclass(frozen=True)
class PreprocessOptions:
    """What the bytes of a dataset depend on, besides log and schema; `max_bad_rows` only decides whether there is one.

    `vocabulary` is a dataset whose vocabularies and dense statistics are used as they are, or, with
    `extend_vocabulary`, whose vocabularies go on behind their last id.

    Raises:
        ConfigError: a number is out of its range.
    """

    min_count: int = DEFAULT_MIN_COUNT
    max_rows: int | None = None
    seed: int = 0
    max_bad_rows: int = 0
    part_rows: int = PART_ROWS
    vocabulary: Path | None = None
    extend_vocabulary: bool = False

    def __post_init__(self) -> None:
        wrong = [
            f"--{name.replace('_', '-')}: must be at least {least}, got {value}"
            for name, value, least in (
                ("min_count", self.min_count, 1),
                ("max_rows", self.max_rows, 2),
                ("seed", self.seed, 0),
                ("max_bad_rows", self.max_bad_rows, 0),
                ("part_rows", self.part_rows, 1),
            )
            if value is not None and value < least
        ]
        if self.seed >= 2**63:
            wrong.append(f"--seed: must be below 2^63, got {self.seed}")
        if self.extend_vocabulary and self.vocabulary is None:
            wrong.append("--extend-vocabulary: needs --vocabulary, the dataset whose ids stay as they are")
        if wrong:
            raise ConfigError("\n".join(wrong))


@dataclass(frozen=True)
class Resources:
    """What the job may use; changes no byte of the dataset.

    `memory_bytes` is for all of it together, or, with `cluster`, for each process of the cluster; `workers` are tasks
    at a time, by default one a core; `cluster` is the address of a Dask scheduler.
    """

    memory_bytes: int = DEFAULT_MEMORY_BYTES
    workers: int | None = None
    cluster: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            msg = f"--workers: must be at least 1, got {self.workers}"
            raise ConfigError(msg)

    @property
    def num_workers(self) -> int:
        """Tasks at a time on this machine."""
        return self.workers or len(os.sched_getaffinity(0))
