"""Writes a synthetic click log in the Criteo layout, and computes the best that any model can reach on it.

In: rows, seed, preset.  Out: `log.tsv` (or `log.tsv.gz`) and `log.tsv.truth.json`; of a log with several values in a
cell also `log.tsv.schema.toml`; of a log of several days a folder of logs.

| stage | input | output | where |
| --- | --- | --- | --- |
| shapes | numbers measured on the real logs | a table of equally likely cells for each column | synthetic_shapes.py |
| model | seed | effects of values and of pairs of values | synthetic_model.py |
| rows | seed, number of a block | lines, labels, true logits | synthetic_rows.py |
| companions | ranks of values | ranks of the other values of their cells | synthetic_multi_hot.py |
| drift | seed, rates, number of a day | effects, and which value has which rank, on that day | synthetic_drift.py |
| files | rows | log and truth | synthetic_files.py, synthetic_truth.py |
| days | days, rates | a folder of logs | synthetic_days.py |
| job | what the user gives | the files | here |

The bytes depend on rows, seed and preset alone, and the first rows of a longer log are those of a shorter one. Memory
does not grow with the rows: true logits lie on a grid, so that counts of clicks for each of its points give the exact
AUC and logloss. Cost on one core: 2 us a row as plain text.
"""

from dataclasses import replace
from pathlib import Path

from torchdlrm.errors import ConfigError
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.synthetic.days import check_days, synthesize_days
from torchdlrm.synthetic.drift import Drift
from torchdlrm.synthetic.files import write_log
from torchdlrm.synthetic.multi_hot import COMPANIONS, Companions, multi_hot_schema
from torchdlrm.synthetic.rows import RowGenerator
from torchdlrm.synthetic.shapes import PRESETS
from torchdlrm.synthetic.truth import SyntheticTruth


def synthesize(
    path: str | Path,
    *,
    rows: int,
    seed: int = 0,
    preset: str = "criteo-kaggle",
    multi_hot: Companions | None = None,
    max_embeddings: int | None = None,
    days: int | None = None,
    drift: Drift | None = None,
    label_delay: float | None = None,
    resume: bool = True,
    progress: ProgressListener = SILENT,
) -> SyntheticTruth:
    """Write a click log and its truth; all files appear under their names only when they are complete.

    Args:
        path: of the log, compressed with gzip when it ends in `.gz`; a file that is there is replaced.
        rows: of the log, at least 1.
        seed: of everything: hidden model, features, labels; not negative.
        preset: `criteo-kaggle` or `criteo-1tb`, which says how columns are distributed and how often rows are clicked.
        multi_hot: with it cells hold as many values as in MLPerf's DLRM-DCNv2 benchmark, 214 a row: behind each value
            stand its companions, `uniform` or `pareto`, which are the same wherever the value is. The schema of such a
            log is written too. Labels and first values, and so the truth, are those of the log without companions; a
            missing value is a value like others.
        max_embeddings: the schema cuts tables to so many rows; only with `multi_hot`.
        days: write a log for each of so many days, `day_00.tsv` and so on, into the folder `path`; `rows` and all else
            is for each. The first is the log without `days`, unless it lacks late clicks.
        drift: what changes from one day to the next; only with `days`, where the default is `Drift()`.
        label_delay: fraction of the clicks that are known only on the day after; only with `days`. Their rows are in
            `day_NN.tsv` without the click, and with it in `late_NN.tsv`.
        resume: with `days`, complete days in the folder are kept, and others added; False: they are replaced.
        progress: shows the rows written.

    Returns:
        The truth about the log, or that about all days, whose `splits` are the days.

    Raises:
        ConfigError: an argument is none of the above.
        LogError: a file cannot be written, or with `resume` the folder holds days of other arguments.
    """
    path = Path(path)
    _check(rows, seed, preset, multi_hot, max_embeddings)
    check_days(path, days, drift, label_delay, preset, multi_hot)
    given = SyntheticTruth(
        rows=rows, seed=seed, preset=preset, multi_hot=multi_hot, drift=drift, label_delay=label_delay or 0.0
    )
    if days is not None:
        return synthesize_days(path, days, replace(given, drift=drift or Drift()), progress, resume=resume)
    generator = RowGenerator(preset, seed, multi_hot)
    schema = multi_hot_schema(generator.shape, max_embeddings) if multi_hot else None
    progress.start_phase("write rows", rows)
    truth, _ = write_log(path, generator, rows, given, progress, schema=schema)
    return truth


def _check(rows: int, seed: int, preset: str, multi_hot: str | None, max_embeddings: int | None) -> None:
    if rows < 1:
        msg = f"rows: {rows} is too few; ask for at least 1"
        raise ConfigError(msg)
    if seed < 0:
        msg = f"seed: {seed} is negative; give 0 or more"
        raise ConfigError(msg)
    if preset not in PRESETS:
        msg = f"preset: there is no {preset!r}; choose {' or '.join(PRESETS)}"
        raise ConfigError(msg)
    if multi_hot is not None and multi_hot not in COMPANIONS:
        msg = f"`multi_hot`: there is no {multi_hot!r}; choose {' or '.join(COMPANIONS)}"
        raise ConfigError(msg)
    if max_embeddings is not None and multi_hot is None:
        msg = "`max_embeddings`: is for the schema of a log with several values in a cell; give `multi_hot` too"
        raise ConfigError(msg)
    if max_embeddings is not None and max_embeddings < 1:
        msg = f"`max_embeddings`: {max_embeddings} is too few; ask for at least 1"
        raise ConfigError(msg)
