"""What goes into a batch, and what comes of it.

In: rows of requests.  Out, of each: probabilities, and how long they took; of the batch, a report for whoever counts or
keeps what was asked.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.bundle.encoded_rows import EncodedRows


class Predictions(Protocol):
    """What a model says of B rows."""

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """[B]."""

    @property
    def num_unknown(self) -> Mapping[str, int]:
        """Values with the id "unknown", by feature."""


# Rows by column name, or typed columns.
Rows = Sequence[Mapping[str, object]] | pl.DataFrame


class Model(Protocol):
    """What predicts; called by one thread at a time."""

    @property
    def is_verified(self) -> bool:
        """Whether nothing is left to do before its first predictions, so that few rows take the time of few rows."""

    def encode(self, requests: Sequence[Rows]) -> EncodedRows:
        """The rows of some requests, one after another.

        Raises:
            UserError: a row of them is wrong.
        """

    def predict(self, rows: EncodedRows) -> Predictions:
        """B rows -> B probabilities."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What became of a batch of B rows.

    Attributes:
        model: what predicted.
        requests: the rows of each request in it.
        request_ids: of these; `num_rows` how many rows each has.
        predictions: of its parts, one after another.
        encode_s, model_s: how long it took to encode the rows and to predict.
    """

    model: Model
    requests: Sequence[Rows]
    request_ids: Sequence[str]
    num_rows: Sequence[int]
    predictions: Sequence[Predictions]
    encode_s: float
    model_s: float

    @property
    def total_rows(self) -> int:
        """B."""
        return sum(self.num_rows)


# Is told of each batch, in the thread that predicts it.
BatchListener = Callable[[BatchReport], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """The probabilities of a request's rows, float32 [B], and how long they took."""

    probabilities: NDArray[np.float32]
    queue_s: float
    encode_s: float
    model_s: float
