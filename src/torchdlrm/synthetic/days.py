"""Writes a synthetic log of several days, whose values and effects drift, a file a day.

In: what is given of the truth, number of days.  Out: `day_00.tsv`, `day_00.tsv.truth.json` and so on, `truth.json`
about all days; with late clicks also `late_00.tsv` and so on.

A day's files depend on seed, preset, rows, rates and the day alone: a folder of few days is the beginning of one of
more, and a job that was killed resumes with the first day that is missing.
"""

import re
from dataclasses import asdict, replace
from pathlib import Path

from torchdlrm.errors import ConfigError, LogError
from torchdlrm.progress import ProgressListener
from torchdlrm.synthetic.drift import Drift
from torchdlrm.synthetic.files import LogitCounts, count_rows, write_log, writing
from torchdlrm.synthetic.rows import RowGenerator
from torchdlrm.synthetic.shapes import PRESETS
from torchdlrm.synthetic.truth import SyntheticTruth, read_truth, truth_path

_OURS = re.compile(r"(day|late)_\d{2,}\.tsv(\.truth\.json)?|truth\.json")
_LEFT_BY_A_KILLED_JOB = re.compile(rf"\.({_OURS.pattern})\.[0-9a-f]{{8}}")
_DAY = re.compile(r"day_(\d{2,})\.tsv")


def day_path(folder: Path, day: int) -> Path:
    """Where the log of a day stands."""
    return folder / f"day_{day:02d}.tsv"


def late_path(folder: Path, day: int) -> Path:
    """Where the rows of a day stand whose clicks came later; no log of a day has such a name."""
    return folder / f"late_{day:02d}.tsv"


def check_days(
    path: Path, days: int | None, drift: Drift | None, label_delay: float | None, preset: str, multi_hot: str | None
) -> None:
    """Raise ConfigError for what makes no sense, LogError for a path that cannot be the folder."""
    if days is None:
        for name, value in (("drift", drift), ("label_delay", label_delay)):
            if value is not None:
                msg = f"`{name}`: is for a log of several days; give `days` too"
                raise ConfigError(msg)
        return
    if days < 1:
        msg = f"`days`: {days} is too few; ask for at least 1"
        raise ConfigError(msg)
    if multi_hot is not None:
        msg = "`days`: a log with several values in a cell has no days; leave out one of `days` and `multi_hot`"
        raise ConfigError(msg)
    if label_delay is not None and not 0.0 <= label_delay < 1.0:
        msg = f"`label_delay`: {label_delay} is not a fraction of the clicks; give 0 or more, and less than 1"
        raise ConfigError(msg)
    (drift or Drift()).check(days, PRESETS[preset])
    if path.suffix in {".gz", ".tsv", ".txt", ".csv"} or (path.exists() and not path.is_dir()):
        msg = f"{path}: `days` writes a folder of logs, and this names a file; name a folder"
        raise LogError(msg)


def synthesize_days(
    folder: Path, days: int, given: SyntheticTruth, progress: ProgressListener, *, resume: bool
) -> SyntheticTruth:
    """Write what is missing of a log of several days.

    Args:
        folder: to write into; it is made where it is not there.
        days: how many.
        given: about each day.
        progress: shows the rows of all days.
        resume: keep complete days; otherwise they are removed first.

    Returns:
        The truth about all days, whose `splits` are the days.

    Raises:
        LogError: as `torchdlrm.synthesize`.
    """
    assert given.drift is not None
    found = _prepare(folder, given, resume=resume)
    progress.start_phase("write rows", days * given.rows)
    generator = RowGenerator(given.preset, given.seed, drift=given.drift)
    total = LogitCounts(0, 0)
    truths = []
    for day in range(days):
        if day:
            generator = generator.next_day()
        if day in found:
            truth, counts = found[day], count_rows(generator, given.rows, progress)
        else:
            late = late_path(folder, day) if given.label_delay else None
            asked = replace(given, day=day)
            truth, counts = write_log(day_path(folder, day), generator, given.rows, asked, progress, late_path=late)
        total.extend(counts)
        truths.append(truth)
    splits = {f"day_{day:02d}": truth.as_part(day * given.rows) for day, truth in enumerate(truths)}
    whole = given.of(total.attainable(), splits, sum(truth.late_clicks for truth in truths))
    with writing(truth_path(folder)) as file:
        file.write(whole.as_json())
    return whole


def _prepare(folder: Path, given: SyntheticTruth, *, resume: bool) -> dict[int, SyntheticTruth]:
    """Make the folder, or find in it the days that are complete."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            if _LEFT_BY_A_KILLED_JOB.fullmatch(file.name) or (not resume and _OURS.fullmatch(file.name)):
                file.unlink()
        numbers = [int(name[1]) for file in folder.iterdir() if (name := _DAY.fullmatch(file.name))]
    except OSError as error:
        msg = f"{folder}: cannot be written ({error.strerror}); choose a folder that may be written"
        raise LogError(msg) from error
    found = {day: read_truth(day_path(folder, day)) for day in sorted(numbers)}
    for day, truth in found.items():
        there, asked = _options(truth), _options(replace(given, day=day))
        differing = [f"{name} {there[name]}, not {asked[name]}" for name in asked if there[name] != asked[name]]
        if differing:
            msg = f"{day_path(folder, day)}: is there already, with {'; '.join(differing)}; "
            msg += "name another folder, or have its days replaced (--force; `resume=False`)"
            raise LogError(msg)
    return found


def _options(truth: SyntheticTruth) -> dict[str, object]:
    drift = asdict(truth.drift) if truth.drift else dict.fromkeys(asdict(Drift()))
    of_drift = {f"drift.{name}": rate for name, rate in drift.items()}
    return {name: getattr(truth, name) for name in ("rows", "seed", "preset", "label_delay", "day")} | of_drift
