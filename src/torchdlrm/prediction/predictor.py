"""Predicts from raw rows with a bundle: the transform code of preprocessing, then the model as served.

In: raw rows, as JSON has them or as typed columns.  Out: the probability of a click of each, and how many of its values
the vocabularies do not have.  Why a room of its own: docs/decisions/predictions-are-made-in-one-room.md.

B rows, L labels, F sparse features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from torchdlrm.bundle import DensePrecision
from torchdlrm.bundle.bundle import Bundle, Verify
from torchdlrm.bundle.check import of_arithmetic
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.errors import BundleError, RowError, shown
from torchdlrm.features.encode import encode
from torchdlrm.features.vocabulary import UNKNOWN_ID
from torchdlrm.model.model_class import ModelClass
from torchdlrm.prediction.explain import Explanation, LeftOut
from torchdlrm.prediction.fast_path import PlainRowEncoder
from torchdlrm.prediction.frames import frame_or_rows, typed_columns
from torchdlrm.prediction.json_rows import Row, RowReader, as_json_rows, joined
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.storage.places import located

# By column name, as JSON has them, or typed columns.
Rows = Sequence[Row] | pl.DataFrame
_EXPLAINED_ROWS = 256  # at once


@dataclass(frozen=True)
class Predictions:
    """What came of B rows.

    Attributes:
        probabilities: of a click, float32 [B]; of a model of several labels, of each of them [B, L].
        num_unknown: for each sparse feature with a vocabulary, how many of its values have no id of their own.
        num_filled: for each dense feature that was never missing in training, how many of its values were missing.
        logits: the log-odds that the probabilities are made of, of the same shape.
    """

    probabilities: NDArray[np.float32]
    num_unknown: Mapping[str, int]
    num_filled: Mapping[str, int]
    logits: NDArray[np.float32]


class Predictor:
    """Predicts from raw rows, for one thread at a time; `Predictor.open` makes one.

    Args:
        bundle: opened.

    Attributes:
        bundle: what it predicts with.
        schema: the columns of a raw row.
        labels: the names of what is predicted, L; the first is the one that the model is judged by.
        never_missing: the dense features that were never missing in training, with their places: a row without one gets
            the mean.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.schema = bundle.schema
        self.labels = [label.name for label in bundle.schema.learnt]
        self._reader = RowReader(bundle.schema)
        self._plain_rows = PlainRowEncoder(bundle.schema, bundle.dense, bundle.vocabularies)
        self._model = ServedModel(bundle)
        self._types: dict[str, tuple[object, ...]] = {
            column.name: (pl.Int64, pl.Float64) if column in self.schema.dense else (column.dtype,)
            for column in self.schema.features
        }
        self.never_missing = {
            column.name: place
            for place, column in enumerate(bundle.schema.dense)
            if bundle.dense[column.name].never_missing
        }
        self._counted = [(i, column.name) for i, column in enumerate(self.schema.sparse) if column.hash is None]

    def __repr__(self) -> str:
        features = ", ".join(column.log_name for column in self.schema.features)
        labels = f" of {', '.join(self.labels)}" if len(self.labels) > 1 else ""
        return f"<Predictor of {self.bundle.name!r}, version {self.version}: {shown(features)} -> probability{labels}>"

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        model_class: ModelClass | None = None,
        allow_changed_model_class: bool = False,
        verify: Verify = "full",
        num_threads: int | None = None,
        progress: ProgressListener = SILENT,
    ) -> Self:
        """Open a bundle to predict with.

        Args:
            path: the bundle's folder, or its URL.
            model_class: of a model that is not ours, the class or function that it was trained with, or where it
                stands, as `my_models.py:GatedSum`.
            allow_changed_model_class: take it though its file has changed since.
            verify: as `Bundle.open`.
            num_threads: threads of the model in this process; by default PyTorch's choice, one a core.
            progress: shows the bytes checked.

        Raises:
            BundleError: there is no bundle, it is damaged, or it is of another model class.
            ConfigError: there is no such model class.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        bundle = Bundle.open(
            located(path),
            model_class=model_class,
            allow_changed_model_class=allow_changed_model_class,
            verify=verify,
            progress=progress,
        )
        return cls(bundle)

    @property
    def dense_precision(self) -> DensePrecision:
        """What the arches compute in on this machine."""
        return self._model.dense_precision

    @property
    def version(self) -> str:
        """The version, which changes with any byte of the bundle."""
        return self.bundle.version

    @property
    def is_verified(self) -> bool:
        """Whether all weights are checked: those that are not are checked before their first use, which takes time."""
        return self.bundle.verifier.is_done

    def parse_rows(self, rows: Sequence[Row]) -> pl.DataFrame:
        """Rows by column name -> typed columns, B rows; what a row does not name is missing.

        Raises:
            RowError: an unknown column, or a cell that does not fit; names the row (from 0), the column and the value.
        """
        return self._reader.read(rows)

    def encode(self, frame: pl.DataFrame) -> EncodedRows:
        """Typed columns -> what the model reads, by the code that preprocessing runs.

        Args:
            frame: the features, of the types that a parsed log has (a dense column may have the other number
                type), B rows; other columns are not read.

        Raises:
            RowError: a feature is not there, or is of another type.
        """
        self._check_types(frame)
        encoded = encode(frame, self.schema, self.bundle.dense, self.bundle.vocabularies)
        rows = EncodedRows.from_frame(encoded, self.schema)
        missing = {place: frame[name] for name, place in self.never_missing.items() if frame[name].null_count()}
        if not missing:
            return rows
        is_filled = np.zeros(rows.dense.shape, np.bool_)
        for place, values in missing.items():
            is_filled[:, place] = values.is_null().to_numpy()
        return replace(rows, is_filled=is_filled)

    def encode_rows(self, rows: Sequence[Row]) -> EncodedRows:
        """`encode(parse_rows(rows))`, to the bit; of plain rows in a fraction of the time.

        Raises:
            RowError: an unknown column, or a cell that does not fit; names the row (from 0), the column and the value.
        """
        encoded = self._plain_rows.encode(rows)
        return self.encode(self.parse_rows(rows)) if encoded is None else encoded

    def encode_requests(self, requests: Sequence[Rows]) -> EncodedRows:
        """The rows of some requests, one after another, as the model reads them.

        Raises:
            RowError: a row has a column that there is not, or a cell that does not fit.
            BundleError: the bundle's files have been written to.
        """
        self.require_undamaged()  # where a file has been cut, to look a value up would end the process
        rows = [request for request in requests if not isinstance(request, pl.DataFrame)]
        if len(rows) == len(requests):
            return self.encode_rows(joined(rows))
        return self.encode(self.parse_requests(requests))

    def parse_requests(self, requests: Sequence[Rows]) -> pl.DataFrame:
        """The rows of some requests, one after another, as the typed columns of the features.

        Raises:
            RowError: a row has a column that there is not, or a cell that does not fit.
        """
        # Rows of several requests together: the cost is that of the calls.
        rows = joined([request for request in requests if not isinstance(request, pl.DataFrame)])
        parsed, end = self.parse_rows(rows) if rows else pl.DataFrame(), 0
        frames = []
        for request in requests:
            if isinstance(request, pl.DataFrame):
                frames.append(request)
            else:
                frames.append(parsed.slice(end, len(request)))
                end += len(request)
        features = [column.name for column in self.schema.features]
        return frames[0] if len(frames) == 1 else pl.concat([frame.select(features) for frame in frames])

    def predict(self, rows: Any) -> NDArray[np.float32]:
        """The probability of a click of each raw row.

        Args:
            rows: B rows: a Polars or pandas frame with a column for each feature, a dict of lists, or a list of dicts;
                cells mean what they mean in a log.

        Returns:
            float32 [B]; of a model of several labels the probability of each of `labels`, [B, L].

        Raises:
            RowError: a feature is not there, or a cell does not fit; names the row (from 0), the column and the value.
            BundleError: a block of the weights that was not checked before is damaged.
        """
        given = frame_or_rows(rows)
        if isinstance(given, pl.DataFrame):
            return self.predict_encoded(self.encode(typed_columns(given, self.schema))).probabilities
        return self.predict_encoded(self.encode_rows(given)).probabilities

    def explain(self, rows: Any, label: str | None = None) -> list[Explanation]:
        """What each feature of each row adds to its logit, at the cost of a prediction for each of its features.

        Args:
            rows: B rows, as for `predict`; raises as that does.
            label: whose logit, where the model has several; the first when not given.

        Raises:
            RowError: the model has no such label; or as `predict`.
        """
        given, found = frame_or_rows(rows), []
        if isinstance(given, pl.DataFrame):
            given = as_json_rows(typed_columns(given, self.schema), self.schema)
        self.encode_rows(given)  # all of them at once: an error has the number of its row
        for start in range(0, len(given), _EXPLAINED_ROWS):
            left_out = LeftOut(given[start : start + _EXPLAINED_ROWS], self.schema, label)
            predictions = self.predict_encoded(self.encode_rows(left_out.rows))
            found += left_out.explained(predictions.probabilities, predictions.logits)
        return found

    def predict_encoded(self, rows: EncodedRows) -> Predictions:
        """The predictions of rows that are encoded, and what they are made of.

        Raises:
            BundleError: a block of the weights that was not checked before is damaged.
        """
        logits = self._model.logits(rows)
        num_filled = dict.fromkeys(self.never_missing, 0)
        if rows.is_filled is not None:
            num_filled = {name: int(rows.is_filled[:, place].sum()) for name, place in self.never_missing.items()}
        return Predictions(torch.from_numpy(logits).sigmoid().numpy(), self._count_unknown(rows), num_filled, logits)

    def predict_undamaged(self, rows: EncodedRows) -> Predictions:
        """As `predict_encoded`, but fails if the bundle's files have been written to.

        Raises:
            BundleError: they have been, or a block of the weights that was not checked before is damaged.
        """
        predictions = self.predict_encoded(rows)
        self.require_undamaged()  # or they were made of what has been written, or of a part of it
        return predictions

    def check_sample(self) -> None:
        """Predict the rows that the bundle carries.

        Raises:
            BundleError: a prediction is not the one that the bundle says it must be.
        """
        frame, expected = self.bundle.sample()
        if frame.is_empty():
            return
        found = self.predict_encoded(self.encode(frame)).probabilities
        # The tables are the same bytes wherever they are read: only the arithmetic may differ between machines.
        allowed = of_arithmetic(self.bundle.manifest.dense_precision).difference
        difference = float(np.abs(found - expected).max(initial=0.0))
        if not difference <= allowed:  # also where it is NaN
            raise BundleError(
                f"{self.bundle.path}: on its own sample of {len(expected)} rows a prediction is off by "
                f"{difference:.2g}, and {allowed:.2g} is allowed; export the run again"
            )

    def require_undamaged(self) -> None:
        """See that the bundle's files have not been written to since it was opened.

        Raises:
            BundleError: they have been.
        """
        damage = self.bundle.find_damage()
        if damage is not None:
            raise damage

    def unknown(self, rows: EncodedRows) -> dict[str, NDArray[np.bool_]]:
        """Whether a value of each row has no id of its own [B], for each feature with a vocabulary."""
        if not isinstance(rows.sparse, tuple):
            return {name: rows.sparse[i] == UNKNOWN_ID for i, name in self._counted}
        found = {name: np.zeros(rows.num_rows, np.bool_) for _, name in self._counted}
        for i, name in self._counted:
            ids, offsets = rows.sparse[i]
            found[name][np.searchsorted(offsets, np.flatnonzero(ids == UNKNOWN_ID), side="right") - 1] = True
        return found

    def _check_types(self, frame: pl.DataFrame) -> None:
        schema = frame.schema
        for name, types in self._types.items():
            if (found := schema.get(name)) not in types:
                msg = f"column {name!r}: expected a column of {' or '.join(map(str, types))}, "
                raise RowError(msg + ("found none" if found is None else f"not {found}"))

    def _count_unknown(self, rows: EncodedRows) -> dict[str, int]:
        if isinstance(rows.sparse, tuple):
            bags = rows.sparse
            return {name: int(np.count_nonzero(bags[i][0] == UNKNOWN_ID)) for i, name in self._counted}
        counts = np.count_nonzero(rows.sparse == UNKNOWN_ID, axis=1).tolist()
        return {name: counts[i] for i, name in self._counted}
