"""Writes synthetic click logs in the Criteo layout, and computes the best that any model can reach on them.

In: rows, seed, preset.  Out: `log.tsv` (or `log.tsv.gz`) and `log.tsv.truth.json`; of a log with several values in a
cell also `log.tsv.schema.toml`; of several days a folder with `day_00.tsv`, `day_00.tsv.truth.json` and so on,
`truth.json` about all days, and with late clicks `late_00.tsv` and so on.

| stage | input | output | where |
| --- | --- | --- | --- |
| shapes | numbers measured on the real logs | a table of equally likely cells for each column | shapes.py |
| model | seed | effects of values and of pairs of values, which drift | model.py |
| values | ranks | the values that have them on a day, and their companions | values.py |
| rows | seed, number of a block | lines, labels, true logits | rows.py |
| shop | seed, first and last row | rows with what the Criteo layout lacks, labels, true logits | shop.py |
| log | rows | log and truth | log.py |
| job | what the user gives | the files | here |

The bytes depend on rows, seed and preset alone, and the first rows of a longer log are those of a shorter one. Those of
a day also depend on its number and the rates, and not on the number of days: a folder of few days is the beginning of
one of more, and a job that was killed resumes with the first day that is missing. Cost on one core: 2 us a row as plain
text.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import numpy as np

from torchdlrm.errors import ConfigError, LogError
from torchdlrm.features.columns import Column, SparseColumn
from torchdlrm.features.schema import FeatureSchema, criteo_schema
from torchdlrm.features.schema_file import schema_toml
from torchdlrm.progress import ProgressListener, watched
from torchdlrm.synthetic.log import Attainable, SyntheticTruth, count_rows, read_truth, truth_path, write_log, writing
from torchdlrm.synthetic.model import NUM_LOGITS
from torchdlrm.synthetic.rows import VALUE_SEPARATOR, RowGenerator
from torchdlrm.synthetic.shapes import MULTI_HOT_SIZES, PRESETS, LogShape
from torchdlrm.synthetic.shop import Extra, ShopGenerator
from torchdlrm.synthetic.values import COMPANIONS, Companions, Drift

_OURS = re.compile(r"(day|late)_\d{2,}\.tsv(\.truth\.json)?|truth\.json")
_LEFT_BY_A_KILLED_JOB = re.compile(rf"\.({_OURS.pattern})\.[0-9a-f]{{8}}")
_DAY = re.compile(r"day_(\d{2,})\.tsv")


def synthesize(
    path: str | Path,
    *,
    rows: int,
    seed: int = 0,
    preset: str | None = None,
    multi_hot: Companions | None = None,
    max_embeddings: int | None = None,
    days: int | None = None,
    drift: Drift | None = None,
    label_delay: float | None = None,
    extras: Sequence[Extra] = (),
    resume: bool = True,
    progress: ProgressListener | bool = True,
) -> SyntheticTruth:
    """Write a click log and its truth; all files appear under their names only when they are complete.

    Args:
        path: of the log, compressed with gzip when it ends in `.gz`; a file that is there is replaced.
        rows: of the log, at least 1.
        seed: of everything: hidden model, features, labels; not negative.
        preset: `criteo-kaggle` (the default) or `criteo-1tb`: how columns are distributed, how often rows are clicked.
        multi_hot: with it cells hold as many values as in MLPerf's DLRM-DCNv2 benchmark, 214 a row: behind each value
            stand its companions, `uniform` or `pareto`, which are the same wherever the value is. The schema of such a
            log is written too. Labels and first values, and so the truth, are those of the log without companions; a
            missing value is a value like others.
        max_embeddings: rows of the largest tables that the schema asks for; only with `multi_hot`.
        days: write a log for each of this number of days, `day_00.tsv` and so on, into the folder `path`; `rows` and
            all else is for each. The first is the log without `days`, unless it lacks late clicks.
        drift: what changes from one day to the next; only with `days`, where the default is `Drift()`.
        label_delay: fraction of the clicks that are known only on the day after; only with `days`. Their rows are in
            `day_NN.tsv` without the click, and with it in `late_NN.tsv`.
        extras: write the log of a shop, and its schema, that has these: `purchase`, a second label; `content`, a vector
            of each item, of which those at the end of the log are new; or `history`, the items that the user looked at
            last. It goes with none of the options above but `rows` and `seed`.
        resume: with `days`, complete days in the folder are kept, and others added; False: they are replaced.
        progress: receives the rows written; True draws a bar on a terminal and in a notebook, False is silent.

    Returns:
        The truth about the log, or that about all days, whose `splits` are the days.

    Raises:
        ConfigError: an argument is none of the above.
        LogError: a file cannot be written, or with `resume` the folder holds days of other arguments.
    """
    path = Path(path)
    of_criteo = preset, multi_hot, max_embeddings, days, drift, label_delay
    problems = [*_problems(rows, seed, preset or "criteo-kaggle", multi_hot, max_embeddings)]
    problems = problems or [*_problems_of_days(PRESETS[preset or "criteo-kaggle"], days, drift, label_delay)]
    if days is not None and multi_hot is not None:
        problems.append(
            "`days`: a log with several values in a cell has no days; leave out one of `days` and `multi_hot`"
        )
    if not {*extras} <= {*get_args(Extra)} or {"content", "history"} <= {*extras}:
        problems.append(f"`content`, `history`: choose one; new items are in no history. Got {', '.join(extras)}")
    if extras and any(option is not None for option in of_criteo):
        problems.append("`preset`, `multi_hot`, `days`: are not for a log with two `labels`, `content` or `history`")
    for problem in problems:
        raise ConfigError(problem)
    if days is not None and (path.suffix in {".gz", ".tsv", ".txt", ".csv"} or (path.exists() and not path.is_dir())):
        raise LogError(f"{path}: `days` writes a folder of logs, and this names a file; name a folder")
    drift = None if days is None else drift or Drift()
    preset = preset or (f"shop with {' and '.join(extras)}" if extras else "criteo-kaggle")
    given = SyntheticTruth(
        rows=rows, seed=seed, preset=preset, multi_hot=multi_hot, drift=drift, label_delay=label_delay or 0.0
    )
    generator = ShopGenerator(seed, extras) if extras else RowGenerator(preset, seed, multi_hot, drift or Drift())
    with watched(progress) as listener:
        if days is not None and isinstance(generator, RowGenerator):
            return _synthesize_days(path, days, given, generator, listener, resume=resume)
        schema = _multi_hot_schema(PRESETS[preset], max_embeddings) if multi_hot else getattr(generator, "schema", None)
        listener.start_phase("write rows", rows)
        truth, _ = write_log(path, generator, given, listener, schema=schema)
        return truth


def day_path(folder: Path, day: int) -> Path:
    """Where the log of a day stands."""
    return folder / f"day_{day:02d}.tsv"


def late_path(folder: Path, day: int) -> Path:
    """Where the rows of a day stand whose clicks came later; no log of a day has such a name."""
    return folder / f"late_{day:02d}.tsv"


def _synthesize_days(
    folder: Path,
    days: int,
    given: SyntheticTruth,
    generator: RowGenerator,
    progress: ProgressListener,
    *,
    resume: bool,
) -> SyntheticTruth:
    """Write what is missing of a log of several days; complete days are kept with `resume`, otherwise removed first."""
    found = _prepare(folder, given, resume=resume)
    progress.start_phase("write rows", days * given.rows)
    total, splits, late_clicks = np.zeros(2 * NUM_LOGITS, np.int64), {}, 0
    for day in range(days):
        if day:
            generator = generator.next_day()
        if day in found:
            truth, counts = found[day], count_rows(generator, given.rows, progress)
        else:
            late = late_path(folder, day) if given.label_delay else None
            asked = given.model_copy(update={"day": day})
            truth, counts = write_log(day_path(folder, day), generator, asked, progress, late_path=late)
        total += counts
        late_clicks += truth.late_clicks
        splits[day_path(folder, day).stem] = Attainable.of(counts, day * given.rows)
    whole = given.of(Attainable.of(total), splits, late_clicks)
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
        there, asked = _options(truth), _options(given.model_copy(update={"day": day}))
        differing = [f"{name} {there.get(name)}, not {asked[name]}" for name in asked if there.get(name) != asked[name]]
        if differing:
            msg = f"{day_path(folder, day)}: is there already, with {'; '.join(differing)}; "
            msg += "name another folder, or have its days replaced (--force; `resume=False`)"
            raise LogError(msg)
    return found


def _options(truth: SyntheticTruth) -> dict[str, object]:
    drift = {f"drift.{name}": rate for name, rate in asdict(truth.drift).items()} if truth.drift else {}
    return truth.model_dump(include={"rows", "seed", "preset", "label_delay", "day"}) | drift


def _multi_hot_schema(shape: LogShape, max_embeddings: int | None) -> str:
    """The schema of a log with companions, as a TOML file.

    Its features are hashed: then tables have the size that is asked for however short the log is, and no values are
    counted, most of which would be seen once.

    Args:
        shape: of the log.
        max_embeddings: rows of the largest tables; None: as many as the log's columns have values.
    """
    columns: list[Column] = [column for column in criteo_schema().columns if not isinstance(column, SparseColumn)]
    for column, values, size in zip(criteo_schema().sparse_columns, shape.sparse, MULTI_HOT_SIZES, strict=True):
        several = {"value_separator": VALUE_SEPARATOR, "max_values": size} if size > 1 else {}
        rows = min(values.cardinality, max_embeddings or values.cardinality)
        columns.append(column.model_copy(update={"hash": rows, **several}))
    return schema_toml(FeatureSchema(name="criteo-multi-hot", columns=tuple(columns)))


def _problems(rows: int, seed: int, preset: str, multi_hot: str | None, max_embeddings: int | None) -> Iterator[str]:
    """What makes no sense about the arguments of `synthesize`."""
    if rows < 1:
        yield f"rows: {rows} is too few; ask for at least 1"
    if seed < 0:
        yield f"seed: {seed} is negative; give 0 or more"
    if preset not in PRESETS:
        yield f"preset: there is no {preset!r}; choose {' or '.join(PRESETS)}"
    if multi_hot not in (None, *COMPANIONS):
        yield f"`multi_hot`: there is no {multi_hot!r}; choose {' or '.join(COMPANIONS)}"
    if max_embeddings is not None and multi_hot is None:
        yield "`max_embeddings`: is for the schema of a log with several values in a cell; give `multi_hot` too"
    if max_embeddings is not None and max_embeddings < 1:
        yield f"`max_embeddings`: {max_embeddings} is too few; ask for at least 1"


def _problems_of_days(
    shape: LogShape, days: int | None, drift: Drift | None, label_delay: float | None
) -> Iterator[str]:
    if days is None:
        for name, value in (("drift", drift), ("label_delay", label_delay)):
            if value is not None:
                yield f"`{name}`: is for a log of several days; give `days` too"
        return
    if days < 1:
        yield f"`days`: {days} is too few; ask for at least 1"
    if label_delay is not None and not 0.0 <= label_delay < 1.0:
        yield f"`label_delay`: {label_delay} is not a fraction of the clicks; give 0 or more, and less than 1"
    yield from (drift or Drift()).problems(days, shape)
