"""Which log a period of a live model learns: the one whose checksum is recorded, and every row once."""

import shutil

import polars as pl
import pytest

from helpers.live_models import CONFIG, SCHEMA, WIDE, files_of
from torchdlrm import LiveModel, LiveSettings, advance
from torchdlrm.errors import LiveError, LogError
from torchdlrm.features.schema_file import schema_toml
from torchdlrm.live.advance import _Period
from torchdlrm.live.logs import find_log, require_readable
from torchdlrm.live.preview import preview_advance


@pytest.mark.parametrize("step", ["_score", "_preprocess"])
def test_a_log_that_is_replaced_while_it_is_read_is_refused(step, copied, logs, monkeypatch, tmp_path):
    """By one with the same labels and other features, which no count of rows or clicks would tell from it."""
    path, kept, other = (tmp_path / name for name in ("live.tsv", "kept.tsv", "other.tsv"))
    shutil.copy(logs[3], path)
    other.write_text(logs[3].read_text().replace("Ulm", "Uln"))
    do = getattr(_Period, step)

    def replaced_before(period):
        path.rename(kept)
        shutil.copy(other, path)
        return do(period)

    with monkeypatch.context() as patched:
        patched.setattr(_Period, step, replaced_before)
        with pytest.raises(LogError, match=r"live\.tsv: the file changed while it was read"):
            advance(copied, path)
    assert LiveModel.open(copied).current == 3
    # Both can be learnt now, each as what it is.
    untouched = shutil.copytree(copied, tmp_path / "other" / "clicks", symlinks=True)
    advance(untouched, path)
    assert "Uln" in vocabulary(untouched)
    kept.replace(path)
    advance(copied, path)
    assert "Uln" not in vocabulary(copied)
    for folder, log in ((untouched, other), (copied, logs[3])):
        assert LiveModel.open(folder).periods[-1].logs[0].sha256 == find_log(log).records[0].sha256


def vocabulary(live):
    return pl.read_parquet(live / "days/0004/dataset/vocabulary/city.parquet")["value"].to_list()


def test_a_log_that_is_too_small_does_not_keep_the_next_from_being_learnt(copied, logs, monkeypatch, tmp_path):
    small = tmp_path / "small.tsv"
    for num_rows in (1, 12):  # of neither is any row held back
        small.write_text("".join(logs[3].read_text().splitlines(keepends=True)[:num_rows]))
        with pytest.raises(LogError, match=f"of {num_rows} good rows none is left for val"):
            advance(copied, small)
        assert LiveModel.open(copied).draft.done == ("score",)
    assert preview_advance(copied, logs[3]).notes == ("period 4 is begun again: its log was not learnt",)
    # One whose preprocessing was killed is not left out by mistake.
    with monkeypatch.context() as patched:
        patched.setattr("torchdlrm.preprocessing.preprocess._finish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            advance(copied, logs[3])
    with pytest.raises(LiveError, match="period 4 was begun with another log and is not complete"):
        advance(copied, logs[4])
    record = advance(copied, logs[3])
    assert (record.period, record.rows, record.base) == (4, 2_000, 3)


def test_every_file_is_learnt_once_whatever_it_was_learnt_with(copied, logs, dlrm, tmp_path):
    copy = shutil.copy(logs[3], tmp_path / "copy.tsv")
    with pytest.raises(LogError, match=r"copy\.tsv: is a copy of .*log-3\.tsv; every row of a log counts once"):
        advance(copied, [logs[3], copy])
    record = advance(copied, logs[3:5])
    before = files_of(copied)
    for again in (logs[3], copy, logs[4], logs[4:2:-1], [logs[0], logs[4]]):
        assert advance(copied, again) == record
    told = dlrm("advance", copied, copy)
    assert (told.returncode, "period 4 has this log, and is complete: nothing was left to do" in told.stderr) == (
        0,
        True,
    )
    assert files_of(copied) == before
    new = tmp_path / "new.tsv"
    new.write_text(logs[0].read_text() + logs[1].read_text())
    with pytest.raises(LiveError, match=r"copy\.tsv was learnt in period 4, .* that are new: .*new\.tsv$"):
        advance(copied, [new, copy])


def test_a_backfill_and_a_loop_over_the_same_days_learn_each_day_once(logs, tmp_path):
    backfill = advance(tmp_path / "live", logs[:3], config=CONFIG, schema=SCHEMA, settings=LiveSettings(gate=WIDE))
    assert [advance(tmp_path / "live", log).period for log in logs[:4]] == [1, 1, 1, 2]
    assert backfill.rows == 6_000


def test_a_dry_run_refuses_what_the_beginning_of_a_log_shows(copied, logs, dlrm, tmp_path):
    rows = pl.read_csv(
        logs[3], separator="\t", has_header=False, new_columns=[column.name for column in SCHEMA.columns]
    )
    named = SCHEMA.model_copy(update={"header": True})
    config, schema = copied / "config.toml", tmp_path / "schema.toml"
    schema.write_text(schema_toml(named))
    written = {
        name: tmp_path / name
        for name in ("none.tsv", "unlabelled.tsv", "none.parquet", "unlabelled.parquet", "unlabelled.jsonl")
    }
    rows.clear().write_csv(written["none.tsv"], separator="\t")
    rows.drop("label").write_csv(written["unlabelled.tsv"], separator="\t")
    rows.clear().write_parquet(written["none.parquet"])
    rows.drop("label").write_parquet(written["unlabelled.parquet"])
    rows.drop("label").write_ndjson(written["unlabelled.jsonl"])
    for name, path in written.items():
        words = "has no row; leave out the log" if name.startswith("none") else "has no column label, which the schema"
        with pytest.raises(LogError, match=words):
            require_readable(find_log(path), named, 0)
    new = tmp_path / "new"
    told = dlrm("advance", new, written["unlabelled.tsv"], "--config", config, "--schema", schema, "--dry-run")
    assert (told.returncode, new.exists()) == (2, False)
    assert "has no column label" in told.stderr
    unlabelled = tmp_path / "plain.tsv"
    rows.drop("label").write_csv(unlabelled, separator="\t", include_header=False)
    with pytest.raises(LogError, match=r"looks tab-separated \(4 columns\), and the schema 'days' is .*5 columns"):
        preview_advance(copied, unlabelled)
