"""The bundle that is served, and how another takes its place without a request lost.

In: a folder, or a symbolic link that somebody moves.  Out: a `ServedBundle`, always whole.  A request keeps the one
that it began with, so no answer is made of two; the old one is forgotten with its last request.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import polars as pl

from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.errors import BundleError, TorchDLRMError
from torchdlrm.features.schema import FeatureSchema, SparseColumn
from torchdlrm.prediction.predictor import Predictions, Predictor
from torchdlrm.prediction.shared_rows import Row, joined
from torchdlrm.serving.batch import Rows
from torchdlrm.serving.request_log import digits_of

NUM_EXAMPLES = 3
Outcome = Literal["swapped", "unchanged"]


class ServedBundle:
    """A bundle in memory.

    Args:
        predictor: of it.

    Attributes:
        version: changes with any byte of the bundle.
        schema: its columns.
        examples: a few raw rows as a log has them, and of each the features whose value the model does not know.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self.version: str = predictor.bundle.version
        self.schema: FeatureSchema = predictor.schema
        frame, unknown = self.sample(NUM_EXAMPLES)  # now: its files are what was checked, and who asks need not wait
        self.examples = rows_as_logged(frame, self.schema), unknown

    @classmethod
    def open(cls, path: Path, *, verify: Literal["full", "lazy"], num_threads: int | None = None) -> "ServedBundle":
        """Open a bundle and see that it predicts what it says it must.

        Raises:
            BundleError: it is damaged, or predicts something else.
        """
        predictor = Predictor.open(path.resolve(), verify=verify, num_threads=num_threads)
        predictor.check_sample()
        return cls(predictor)

    @property
    def name(self) -> str:
        """What the bundle calls itself."""
        return self._predictor.bundle.name

    def sample(self, num_rows: int) -> tuple[pl.DataFrame, list[list[str]]]:
        """The first raw rows that the bundle carries, and of each the features whose value the model does not know."""
        rows = self._predictor.bundle.sample()[0].head(num_rows)
        return rows, self._predictor.unknown_features(rows)

    def find_damage(self) -> BundleError | None:
        """What is wrong with its files, if that is known; takes microseconds."""
        return self._predictor.bundle.find_damage()

    def is_same_as(self, other: "ServedBundle") -> bool:
        """Whether it is the same version out of the same files."""
        files, others = self._predictor.bundle.files, other._predictor.bundle.files
        return self.version == other.version and files.identity == others.identity

    @property
    def is_verified(self) -> bool:
        """Whether all of its weights are checked: what is not is checked before it is used first, which takes time."""
        return self._predictor.bundle.verifier.is_done

    def encode(self, requests: Sequence[Rows]) -> EncodedRows:
        """The rows of some requests, one after another, as the model reads them.

        Raises:
            RowError: a row has a column that there is not, or a cell that does not fit.
            BundleError: somebody has written to the bundle's files.
        """
        self._require_undamaged()  # where a file has been cut, to look a value up would end the process
        frames = [request for request in requests if isinstance(request, pl.DataFrame)]
        rows = joined([request for request in requests if not isinstance(request, pl.DataFrame)])
        if not frames:
            return self._predictor.encode_rows(rows)
        typed = self._predictor.encode(frames[0] if len(frames) == 1 else pl.concat(frames))
        if not rows:
            return typed
        # Rows of the same form are encoded together, then each request's put in its place.
        plain = self._predictor.encode_rows(rows)
        pieces, ends = [], {False: 0, True: 0}
        for request in requests:
            is_frame = isinstance(request, pl.DataFrame)
            start, ends[is_frame] = ends[is_frame], ends[is_frame] + len(request)
            pieces.append((typed if is_frame else plain).part(start, ends[is_frame]))
        return EncodedRows.concatenated(pieces)

    def read(self, requests: Sequence[Rows]) -> pl.DataFrame:
        """The rows of some requests, one after another, as typed columns; raises as `encode`."""
        frames: list[pl.DataFrame] = []
        for is_frame, group in itertools.groupby(requests, lambda request: isinstance(request, pl.DataFrame)):
            if is_frame:
                frames += group  # type: ignore[arg-type]  # as was asked
            else:  # those of several requests together: the cost is that of the calls
                frames.append(self._features(joined(list(group))))  # type: ignore[arg-type]  # as was asked
        return pl.concat(frames)

    def predict(self, rows: EncodedRows) -> Predictions:
        """B rows -> B probabilities.

        Raises:
            BundleError: somebody has written to the bundle's files.
        """
        predictions = self._predictor.predict_encoded(rows)
        self._require_undamaged()  # or they were made of what has been written, or of a part of it
        return predictions

    def _require_undamaged(self) -> None:
        damage = self.find_damage()
        if damage is not None:
            raise damage

    def _features(self, rows: Sequence[Row]) -> pl.DataFrame:
        frame = self._predictor.parse_rows(rows)
        return frame.select(column.name for column in (*self.schema.dense, *self.schema.sparse))


def rows_as_logged(frame: pl.DataFrame, schema: FeatureSchema) -> list[dict[str, object]]:
    """The features of typed rows, each by its column's name, as a log has them."""
    features = [
        digits_of(frame[column.name], column) if isinstance(column, SparseColumn) else frame[column.name]
        for column in (*schema.dense, *schema.sparse)
    ]
    return pl.DataFrame(features).to_dicts()


class Bundles:
    """Holds the bundle that is served now.

    Args:
        path: where it lies; read again at each swap.
        current: opened from there.
        verify: as for `Bundle.open`.
        swapped: is told the old and the new one; in the event loop.
    """

    def __init__(
        self,
        path: Path,
        current: ServedBundle,
        *,
        verify: Literal["full", "lazy"],
        swapped: Callable[[ServedBundle, ServedBundle], None],
    ) -> None:
        self._path, self._verify, self._swapped = path, verify, swapped
        self.current = current
        self._one_at_a_time = asyncio.Lock()
        self._loader = ThreadPoolExecutor(1, "loader")

    async def reload(self) -> Outcome:
        """Load what lies at the path now, check it, and serve it from then on.

        Raises:
            BundleError: it is damaged, or fails its own sample; the old one is served as before.
        """
        async with self._one_at_a_time:
            loop = asyncio.get_running_loop()
            try:
                loaded = await loop.run_in_executor(self._loader, self._load)
            except TorchDLRMError:
                raise
            except Exception as error:
                msg = f"{self._path}: cannot be loaded: {error}"
                raise TorchDLRMError(msg) from error
            # The same version out of other files is a bundle that was copied again, because of damage perhaps that
            # is found only later.
            if loaded.is_same_as(self.current) and self.current.find_damage() is None:
                return "unchanged"
            before, self.current = self.current, loaded
            self._swapped(before, loaded)
            return "swapped"

    def close(self) -> None:
        """Load nothing more."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _load(self) -> ServedBundle:
        return ServedBundle.open(self._path, verify=self._verify)
