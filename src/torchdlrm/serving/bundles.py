"""Holds the bundle that is served, and replaces it by another without losing a request.

In: a folder, or a symbolic link that somebody moves.  Out: a `Predictor`.  A request keeps the one that it began with,
so no answer is made of two bundles; the old one is freed with its last request.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from torchdlrm.bundle.bundle import Verify
from torchdlrm.errors import TorchDLRMError
from torchdlrm.model.model_class import ModelClass
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.serving.row_routes import Examples, examples_of

Outcome = Literal["swapped", "unchanged"]


class Bundles:
    """Holds the bundle that is served now.

    Args:
        path: where it lies; read again at each swap.
        model_class: as for `Bundle.open`.
        allow_changed_model_class: likewise.
        verify: likewise.
        swapped: is called with the old and the new one, in the event loop.
        is_checked: whether all of the first one has just been checked.

    Attributes:
        current: the predictor of the bundle that is served now.
        examples: a few rows of its sample; read when it was loaded, while its files were as checked.

    Raises:
        BundleError: the bundle there cannot be served.
    """

    def __init__(
        self,
        path: Path,
        *,
        model_class: ModelClass | None,
        allow_changed_model_class: bool,
        verify: Verify,
        swapped: Callable[[Predictor, Predictor], None],
        is_checked: bool,
    ) -> None:
        self._path, self._verify, self._swapped = path, verify, swapped
        self._model_class, self._may_have_changed = model_class, allow_changed_model_class
        self.current, self.examples = self._load("lazy" if is_checked else verify)
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
                predictor, examples = await loop.run_in_executor(self._loader, self._load, self._verify)
            except TorchDLRMError:
                raise
            except Exception as error:
                msg = f"{self._path}: cannot be loaded: {error}"
                raise TorchDLRMError(msg) from error
            before, now = self.current.bundle, predictor.bundle
            # The same version out of other files is a bundle that was copied again, because of damage perhaps that
            # is found only later.
            is_same = now.version == before.version and now.files.identity == before.files.identity
            if is_same and before.find_damage() is None:
                return "unchanged"
            old, self.current, self.examples = self.current, predictor, examples
            self._swapped(old, predictor)
            return "swapped"

    def close(self) -> None:
        """Stop loading bundles."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _load(self, verify: Verify) -> tuple[Predictor, Examples]:
        """Open the bundle, and see that it predicts what it says it must."""
        predictor = Predictor.open(
            self._path.resolve(),
            model_class=self._model_class,
            allow_changed_model_class=self._may_have_changed,
            verify=verify,
        )
        predictor.check_sample()
        return predictor, examples_of(predictor)
