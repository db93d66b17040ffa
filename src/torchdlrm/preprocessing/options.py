"""Defines the options of a preprocessing job, which are also options of `dlrm preprocess`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, Token

from torchdlrm.errors import ConfigError
from torchdlrm.features.vocabulary import DEFAULT_MIN_COUNT
from torchdlrm.units import parse_bytes, show_bytes

PART_ROWS = 1 << 20
DEFAULT_MEMORY_BYTES = 4_000_000_000
# Files hold periods as int32.
MAX_PERIOD = 2**31 - 2
# Python with Polars and PyArrow loaded, before it has read a byte.
BASE_BYTES = 160 << 20


def _size(_: type, tokens: Sequence[Token]) -> int:
    try:
        return parse_bytes(tokens[0].value, "memory_bytes")
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("`memory_bytes`: ")) from error  # the parser names the option


@Parameter(name="*")
@dataclass(frozen=True)
class PreprocessOptions:
    """What the bytes of a dataset depend on, besides log and schema; `max_bad_rows` only decides whether there is one.

    Attributes:
        min_count: A categorical value in fewer training rows than this has no id of its own.
        max_embeddings: Most rows that the embedding table of a feature may have; the rarest values lose their ids, or
            with --period those that were seen least recently.
        seed: Seed of the order of the training rows, and of a random split.
        max_bad_rows: Skip up to this many rows that the schema cannot read.
        part_rows: Most rows of a part file, about.
        vocabulary: Encode with the vocabularies and dense statistics of this dataset.
        extend_vocabulary: Give new frequent values ids behind those of --vocabulary, which stay as they are; with
            --period the ids that are free come first.
        period: Number of the period (a day, an hour) that the log is of: from then on values come and go, and the
            dataset says when each was seen. By default that of --vocabulary + 1, where it has one.
        expire_after: A value that is not seen in N periods, this one included, loses its id to a new value.
        admit_over: Count the rows of a value over N periods, this one included, until they are --min-count; what is
            too rare so far is kept in the dataset.

    Raises:
        ConfigError: a number is out of its range.
    """

    min_count: int = DEFAULT_MIN_COUNT
    max_embeddings: int | None = None
    seed: int = 0
    max_bad_rows: int = 0
    part_rows: Annotated[int, Parameter(parse=False)] = PART_ROWS
    vocabulary: Path | None = None
    extend_vocabulary: Annotated[bool, Parameter(negative="")] = False
    period: int | None = None
    expire_after: int | None = None
    admit_over: int = 1

    def __post_init__(self) -> None:
        """See that the options make sense, all in one message."""
        wrong = [
            f"`{name}`: must be at least {least}, got {value}"
            for name, value, least in (
                ("min_count", self.min_count, 1),
                ("max_embeddings", self.max_embeddings, 2),
                ("seed", self.seed, 0),
                ("max_bad_rows", self.max_bad_rows, 0),
                ("part_rows", self.part_rows, 1),
                ("period", self.period, 0),
                ("expire_after", self.expire_after, 1),
                ("admit_over", self.admit_over, 1),
            )
            if value is not None and value < least
        ]
        if self.seed >= 2**63:
            wrong.append(f"`seed`: must be below 2^63, got {self.seed}")
        if self.period is not None and self.period > MAX_PERIOD:
            wrong.append(f"`period`: must be at most {MAX_PERIOD}, got {self.period}")
        if self.extend_vocabulary and self.vocabulary is None:
            wrong.append("`extend_vocabulary`: needs `vocabulary`, the dataset whose ids stay as they are")
        if self.vocabulary is not None and not self.extend_vocabulary:
            wrong += [
                f"`{name}`: a `vocabulary` that is not extended stays as it is; give `extend_vocabulary` too"
                for name, is_given in (
                    ("period", self.period is not None),
                    ("expire_after", self.expire_after is not None),
                    ("admit_over", self.admit_over > 1),
                )
                if is_given
            ]
        if wrong:
            raise ConfigError("\n".join(wrong))


@Parameter(name="*")
@dataclass(frozen=True)
class Resources:
    """What the job may use; changes no byte of the dataset.

    Attributes:
        memory_bytes: Memory that the job may use, all in all, as in 500MB; on a cluster, that of each worker process.
        workers: Tasks at a time; by default one a core.
        cluster: Address of a Dask scheduler whose workers do the work; they see the same files, or the same bucket.
    """

    memory_bytes: Annotated[
        int, Parameter(name="--memory", converter=_size, show_default=show_bytes, allow_leading_hyphen=True)
    ] = DEFAULT_MEMORY_BYTES
    workers: int | None = None
    cluster: str | None = None

    def __post_init__(self) -> None:
        """See that there is a worker at least."""
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"`workers`: must be at least 1, got {self.workers}")

    @property
    def num_workers(self) -> int:
        """Tasks at a time on this machine."""
        return self.workers or len(os.sched_getaffinity(0))
