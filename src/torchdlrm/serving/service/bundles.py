"""Holds the bundle that is served, and replaces it by another without losing a request.

In: a folder, or a symbolic link that is moved.  Out: a `Predictor`.  A request keeps the one that it began with,
so no answer is made of two bundles; the old one is freed with its last request.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchdlrm.bundle.bundle import Bundle, Verify
from torchdlrm.bundle.delta import Delta
from torchdlrm.bundle.patched_bundle import PatchedBundle
from torchdlrm.errors import BundleError, StorageError, TorchDLRMError
from torchdlrm.prediction.json_rows import rows_as_logged
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.serving.options import ServeOptions
from torchdlrm.serving.service.following import Target, deltas_to, first_bundle

_NUM_EXAMPLES = 3
# Of a bundle's bytes, what deltas may take of memory before it is mapped instead.
_MOST_PATCHED = 0.5
# After the first failure; then twice as long each time, since what failed may be large, and may be complete some day.
_RETRY_S = 60.0

# Rows as a log has them, and of each the features whose value is not in the vocabulary.
Examples = tuple[list[dict[str, object]], list[list[str]]]


@dataclass(frozen=True)
class Swap:
    """What came of an attempt to serve what the path leads to.

    Attributes:
        outcome: whether another bundle is served now.
        num_deltas: that were applied in memory; 0 where a whole bundle was loaded.
        refused: why deltas that lead there were not applied, and a whole bundle was loaded instead.
    """

    outcome: Literal["swapped", "unchanged"]
    num_deltas: int = 0
    refused: str | None = None


class Bundles:
    """Holds the bundle that is served now.

    Args:
        path: where it lies; read again at each swap.
        options: how it is opened.
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
        options: ServeOptions,
        swapped: Callable[[Predictor, Predictor], None],
        *,
        is_checked: bool = False,
    ) -> None:
        self._path, self._options, self._swapped = path, options, swapped
        self._seen, self._seen_s, self._num_failures = Target.of(path), time.monotonic(), 0
        first = first_bundle(self._seen)
        bundle = self._open(first, "lazy" if is_checked else options.verify)
        deltas = [] if first == self._seen else deltas_to(self._seen, bundle.manifest_sha256)
        self.current, self.examples = _checked(_patched(bundle, deltas))
        self._one_at_a_time = asyncio.Lock()
        self._loader = ThreadPoolExecutor(1, "loader")

    async def reload(self) -> Swap:
        """Load what lies at the path now, check it, and serve it from then on.

        Raises:
            BundleError: it is damaged, or fails its own sample; the old one is served as before.
        """
        async with self._one_at_a_time:
            return await self._swap(await self._look(), is_followed=False)

    async def follow(self) -> Swap | None:
        """Serve what the path leads to, if that is another folder than last time: by deltas in memory, if it has them.

        What has failed is tried again when it is copied again, and after a minute, two, four and so on.

        Returns:
            None where nothing is new.

        Raises:
            BundleError: it is damaged, or fails its own sample; the old one is served as before.
        """
        async with self._one_at_a_time:
            target = await self._look(None if self._num_failures else self._seen)
            if target.path == self._seen.path:
                delay_s = _RETRY_S * 2.0 ** (self._num_failures - 1)
                is_due = target != self._seen or time.monotonic() - self._seen_s >= delay_s
                if not self._num_failures or not is_due:
                    return None
            return await self._swap(target, is_followed=True)

    def close(self) -> None:
        """Stop loading bundles."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    async def _look(self, seen: Target | None = None) -> Target:
        """In the thread: a file system may take its time."""
        return await asyncio.get_running_loop().run_in_executor(self._loader, Target.of, self._path, seen)

    async def _swap(self, target: Target, *, is_followed: bool) -> Swap:
        before_failed = self._seen, self._num_failures
        self._num_failures = self._num_failures + 1 if target == self._seen else 1
        self._seen, self._seen_s = target, time.monotonic()
        loop = asyncio.get_running_loop()
        try:
            predictor, examples, swap = await loop.run_in_executor(self._loader, self._load, target, is_followed)
        except StorageError:  # as soon as the bucket answers
            self._seen, self._num_failures = before_failed
            raise
        except TorchDLRMError:
            raise
        except Exception as error:
            raise TorchDLRMError(f"{self._path}: cannot be loaded: {error}") from error
        self._num_failures = 0
        before, now = self.current.bundle, predictor.bundle
        # The same version out of other files is a bundle that was copied again, because of damage perhaps that
        # is found only later.
        is_same = now.version == before.version and now.files.identity == before.files.identity
        if is_same and before.find_damage() is None:
            return Swap("unchanged")
        old, self.current, self.examples = self.current, predictor, examples
        self._swapped(old, predictor)
        return swap

    def _load(self, target: Target, is_followed: bool) -> tuple[Predictor, Examples, Swap]:  # noqa: FBT001 - by a thread
        """A predictor of the target, checked; by deltas where it is followed, or where there is nothing but deltas."""
        refused = None
        if is_followed or not target.has_bundle:
            try:
                deltas = deltas_to(target, self.current.bundle.manifest_sha256)
                bundle = _patched(self.current.bundle, deltas)
                whole_bytes = sum(record.size_bytes for record in bundle.manifest.files.values())
                if deltas and (not target.has_bundle or bundle.memory_bytes <= _MOST_PATCHED * whole_bytes):
                    return *_checked(bundle), Swap("swapped", num_deltas=len(deltas))
            except Exception as error:
                if not target.has_bundle:
                    raise
                refused = f"{error}"
        if not target.has_bundle and target.has_delta:
            raise BundleError(
                f"{target.path}: no whole bundle, and no deltas that lead there from the version that is served, "
                f"{self.current.version}; copy the whole bundle, or all deltas since"
            )
        return *_checked(self._open(target, self._options.verify)), Swap("swapped", refused=refused)

    def _open(self, target: Target, verify: Verify) -> Bundle:
        return Bundle.open(
            target.path,
            model_class=self._options.model_class,
            allow_changed_model_class=self._options.allow_changed_model_class,
            verify=verify,
        )


def _patched(bundle: Bundle, deltas: list[Path]) -> Bundle:
    """A bundle with some deltas applied in memory."""
    if deltas and (damage := bundle.find_damage()) is not None:
        raise damage
    for path in deltas:
        bundle = PatchedBundle(bundle, Delta.open(path))
    return bundle


def _checked(bundle: Bundle) -> tuple[Predictor, Examples]:
    """See that a bundle predicts what it says it must."""
    predictor = Predictor(bundle)
    predictor.check_sample()
    frame = bundle.sample()[0].head(_NUM_EXAMPLES)
    unknown = predictor.unknown(predictor.encode(frame))
    features = [[name for name, is_unknown in unknown.items() if is_unknown[i]] for i in range(frame.height)]
    return predictor, (rows_as_logged(frame, predictor.schema), features)


def identity_of(bundle: Bundle) -> dict[str, str | int]:
    """Name a bundle in answers and in the log: by its version, and by its period if it has one."""
    return {"version": bundle.version} | ({} if bundle.period is None else {"period": bundle.period})
