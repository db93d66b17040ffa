"""A live model on disk: its folder, its periods, and which of them is current.

LIVE/
  live.toml  schema.toml  config.toml  days/0001/  bundles/0001/  bundles/0002.delta/  current -> bundles/0002
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError

from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.errors import BundleError, LiveError
from torchdlrm.files import remove_folder, sync, write_atomically
from torchdlrm.folders import wrong_folder
from torchdlrm.live.record import RECORD_NAME, GateRecord, LogRecord, PeriodRecord, ProgressiveMetrics, StepName
from torchdlrm.live.settings import LiveSettings, changed_settings
from torchdlrm.records import Record
from torchdlrm.storage import mirror
from torchdlrm.storage.lease import held
from torchdlrm.storage.objects import ChangedError
from torchdlrm.storage.places import located

SETTINGS_NAME, SCHEMA_NAME, CONFIG_NAME = "live.toml", "schema.toml", "config.toml"
CURRENT_NAME, BUNDLES_NAME, DAYS_NAME, LOCK_NAME = "current", "bundles", "days", ".lock"
RUN_NAME, DATASET_NAME, REPLAY_NAME, _DRAFT_NAME = "run", "dataset", "replay", "draft.json"
_OURS = (SETTINGS_NAME, SCHEMA_NAME, CONFIG_NAME, CURRENT_NAME, BUNDLES_NAME, DAYS_NAME, LOCK_NAME)
_OURS_HALF_WRITTEN = tuple(f".{name}" for name in _OURS)
# What is read of all periods; the rest is fetched when it is needed.
_KNOWN = ("*.toml", f"{DAYS_NAME}/*.json")


class Draft(Record):
    """What is known of a period that is not complete.

    Attributes:
        period: its number.
        base: the period whose model is learnt from; None for the first.
        logs: the files.
        done: the steps that are complete.
        progressive: how the base predicted the log.
        unseen_fraction: by feature, of the log's values those without an id in the base's vocabulary.
        gate: whether the candidate is good enough.
        settings: of the live model, by which the steps are done; None in one of an earlier version.
        config: of the runs, as TOML; likewise.
    """

    period: int
    base: int | None
    logs: tuple[LogRecord, ...]
    done: tuple[StepName, ...] = ()
    progressive: ProgressiveMetrics | None = None
    unseen_fraction: dict[str, float] = Field({})
    gate: GateRecord | None = None
    settings: LiveSettings | None = None
    config: str | None = None
    format: Literal["torchdlrm-draft"] = "torchdlrm-draft"


class LiveModel:
    """The folder of a live model.

    Args:
        path: the folder; need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._confirm: Callable[[], None] = lambda: None  # that no other process has taken over
        self._tag: str | None = None  # of the object `current`
        self._records: dict[tuple[str, int, int], PeriodRecord] = {}  # by number, and what says that a file is the same

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """A live model that is there, in a folder or at a URL.

        Raises:
            LiveError: there is none.
        """
        live = cls(located(path)).fetch()
        if not live.exists:
            raise wrong_folder(live.path, "live model")
        return live

    def fetch(self) -> Self:
        """Bring what is known of the periods into the cache, where this is in a bucket, as it is there now."""
        for _ in range(20):
            with suppress(ChangedError):  # a process that advances has written its draft meanwhile
                mirror.fetch(self.path, _KNOWN)
                break
        self._tag = mirror.fetch_link(self.path / CURRENT_NAME)
        return self

    @property
    def exists(self) -> bool:
        """Whether the first period has been begun."""
        return (self.path / SETTINGS_NAME).is_file()

    @property
    def settings(self) -> LiveSettings:
        """What `live.toml` says.

        Raises:
            LiveError: the file is wrong.
        """
        return changed_settings(self.path / SETTINGS_NAME, LiveSettings())

    def day(self, period: int) -> Path:
        """The folder of a period: its record, scores, dataset and run."""
        return self.path / DAYS_NAME / f"{period:04d}"

    def bundle(self, period: int) -> Path:
        """The folder of a period's bundle."""
        return self.path / BUNDLES_NAME / f"{period:04d}"

    def delta(self, period: int) -> Path:
        """The folder of the delta to a period's bundle from that of its base, if there is one."""
        return self.path / BUNDLES_NAME / f"{period:04d}.delta"

    @property
    def periods(self) -> list[PeriodRecord]:
        """The records of all complete periods, oldest first.

        Raises:
            LiveError: one is damaged.
        """
        known, self._records = self._records, {}
        for day in self._days():
            with suppress(FileNotFoundError):
                stat = (day / RECORD_NAME).stat()
                key = day.name, stat.st_ino, stat.st_mtime_ns
                self._records[key] = known.get(key) or PeriodRecord.read(day)
        return [*self._records.values()]

    @property
    def complete(self) -> list[int]:
        """The numbers of all complete periods, oldest first."""
        return [int(day.name) for day in self._days() if (day / RECORD_NAME).exists()]

    @property
    def current(self) -> int | None:
        """The period whose model is published; None where none is.

        Raises:
            LiveError: `current` leads nowhere, is something else than a link to a bundle of this model, or is missing
                though one was published.
        """
        link = self.path / CURRENT_NAME
        remedy = f"dlrm rollback {self.path} N leads it to the bundle of period N"
        if not os.path.lexists(link):
            published = ", ".join(str(record.period) for record in self.periods if record.published)
            if not published:
                return None
            msg = f"{link}: is missing, as in a copy without links, and period {published} was published; {remedy}"
            raise LiveError(msg)
        target = str(link.readlink()) if link.is_symlink() else ""
        found = re.fullmatch(rf"{BUNDLES_NAME}/(\d{{4,}})", target)
        if found is None:
            remedy = remedy if target else f"remove it; then {remedy}"
            what = f"leads to {target}" if target else "is no symbolic link"
            raise LiveError(f"{link}: {what}, and not to a bundle of this live model; {remedy}")
        try:
            BundleManifest.read(self.bundle(int(found[1])))
        except BundleError as error:
            raise LiveError(f"{link}: leads to {target}, which is no sound bundle: {error}; {remedy}") from error
        return int(found[1])

    def switch(self, period: int | None) -> None:
        """Lead `current` to the bundle of a period, atomically; None removes it.

        Raises:
            LiveError: it is a folder.
        """
        link = self.path / CURRENT_NAME
        if link.is_dir() and not link.is_symlink():
            msg = f"{link}: is a folder and no link, as in a copy that followed links; remove it, and do this again"
            raise LiveError(msg)
        self._confirm()
        if period is None:
            mirror.remove(link)
            link.unlink(missing_ok=True)
            self._tag = None
        else:
            self._tag = mirror.lead_link(link, f"{BUNDLES_NAME}/{self.bundle(period).name}", self._tag)
        sync(self.path)

    @property
    def unfinished(self) -> int | None:
        """The number of the period that has been begun and is not complete, if there is one."""
        days = self._days()
        is_one = days and (days[-1] / _DRAFT_NAME).exists() and not (days[-1] / RECORD_NAME).exists()
        return int(days[-1].name) if is_one else None

    @property
    def draft(self) -> Draft | None:
        """What is known of the period that is not complete, if there is one.

        Raises:
            LiveError: its file is damaged.
        """
        period = self.unfinished
        if period is None:
            return None
        path = self.day(period) / _DRAFT_NAME
        try:
            return Draft.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            msg = f"{path}: damaged ({str(error).splitlines()[0]}); give `restart` to begin the period again"
            raise LiveError(msg) from error

    def write_draft(self, draft: Draft) -> None:
        """Write down how far a period is."""
        self._confirm()
        folder = self.day(draft.period)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / _DRAFT_NAME, draft.model_dump_json(indent=1) + "\n")

    def remove_period(self, period: int, base: int | None) -> None:
        """Remove a period that is not complete, or was not published; `current` leads to its base afterwards."""
        if os.path.lexists(self.path / CURRENT_NAME) and self.current == period:
            self.switch(base)
        for folder in (self.bundle(period), self.delta(period), self.day(period)):
            remove_folder(folder)

    def tidy(self) -> None:
        """Remove what complete periods no longer need: what their steps left, and runs and bundles that are too old.

        The runs and datasets of the newest `keep_runs` periods stay, and the bundles of the newest `keep_bundles`; and
        all of the current period, which the next one is learnt from.
        """
        settings, current, complete = self.settings, self.current, self.complete
        _remove_hidden(self.path, _OURS_HALF_WRITTEN)  # something else may be the owner's, such as .git
        for name in (DAYS_NAME, BUNDLES_NAME):
            _remove_hidden(self.path / name)
        for period in complete:
            day = self.day(period)
            _remove_hidden(day)
            if (day / _DRAFT_NAME).exists():  # to ask the bucket takes time
                mirror.remove_files([day / _DRAFT_NAME])
            old = [day / REPLAY_NAME]
            if period != current and period not in complete[-settings.keep_runs :]:
                old += [day / RUN_NAME, day / DATASET_NAME]
            if period != current and period not in complete[-settings.keep_bundles :]:
                old += [self.bundle(period), self.delta(period)]
            for folder in filter(Path.exists, old):
                remove_folder(folder)

    def require_ours(self) -> None:
        """See that the folder of a new live model holds no files that are not its own.

        Raises:
            LiveError: something is.
        """
        if self.path.exists() and not self.path.is_dir():
            raise LiveError(f"`live`: {self.path} is a file; give the folder of a live model, or of a new one")
        others = [path.name for path in self.path.iterdir()] if self.path.exists() else []
        others = [name for name in others if name not in _OURS and not name.startswith(_OURS_HALF_WRITTEN)]
        if others and not self.exists:
            msg = f"`live`: {self.path} holds {others[0]} and no live model (no {SETTINGS_NAME}); give another folder"
            raise LiveError(msg)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing this live model.

        Raises:
            LiveError: one of this host is changing it.
            StorageError: one of another host.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        msg = f"`live`: another process is advancing {self.path}, or rolling it back; wait for it"
        with held(self.path / LOCK_NAME, LiveError(msg)) as self._confirm:
            yield

    def _days(self) -> list[Path]:
        folder = self.path / DAYS_NAME
        days = folder.iterdir() if folder.is_dir() else ()
        return sorted((day for day in days if re.fullmatch(r"\d{4,}", day.name)), key=lambda day: int(day.name))


def _remove_hidden(folder: Path, prefixes: tuple[str, ...] = (".",)) -> None:
    """Remove what killed processes have half written; only the process that holds the lock writes."""
    for path in folder.glob(".*"):
        if not path.name.startswith(prefixes):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_NAME:
            path.unlink()


def rollback(live: str | Path, period: int) -> PeriodRecord:
    """Publish the model of an earlier period; the next period is learnt from it.

    A period whose model was not good enough is published by this, too.

    Args:
        live: folder of the live model.
        period: its number.

    Returns:
        The record of the period.

    Raises:
        LiveError: there is no such period, its bundle is no longer there, or another process is changing the model.
    """
    model = LiveModel.open(live)
    with model.locked():
        model.fetch()
        records = {record.period: record for record in model.periods}
        if period not in records:
            known = ", ".join(map(str, records)) or "none"
            raise LiveError(f"`period`: {live} has no complete period {period}; it has {known}")
        try:
            BundleManifest.read(model.bundle(period))
        except BundleError as error:
            kept = [str(number) for number in records if model.bundle(number).is_dir()]
            msg = f"`period`: the bundle of period {period} cannot be published: {error}"
            if not model.bundle(period).exists():
                msg = f"`period`: the bundle of period {period} was removed (keep_bundles); there are {', '.join(kept)}"
            raise LiveError(msg) from error
        model.switch(period)
        record = records[period].model_copy(update={"published": True})
        if record != records[period]:
            record.write(model.day(period))
    return record
