"""A live model: each log is scored before it is learnt from, and what comes of it is what the single commands give."""

import json
import os
import random
import shutil
import signal
import threading
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from helpers.live_models import CONFIG, NUM_DAYS, SCHEMA, WIDE, files_of
from helpers.pages import tables_of
from helpers.trainings import Process, checkpoints, wait_until
from torchdlrm import (
    Bundle,
    Dataset,
    ExportOptions,
    GateSettings,
    LiveModel,
    LiveSettings,
    PreprocessOptions,
    advance,
    apply_delta,
    export,
    preprocess,
    rollback,
    train,
)
from torchdlrm.config import config_toml
from torchdlrm.errors import LiveError, LogError
from torchdlrm.features.columns import LabelColumn, WeightColumn
from torchdlrm.features.schema_file import schema_toml, with_split
from torchdlrm.live.record import PeriodRecord, read_times
from torchdlrm.prediction.files import predict_file
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.prediction.rows_in import RowsIn

NUM_KILLS = int(os.environ.get("TORCHDLRM_NUM_KILLS", "3"))


def test_progressive_metrics_equal_those_of_predict_with_yesterdays_bundle(three_days, logs, dlrm, tmp_path):
    live = LiveModel.open(three_days)
    assert live.periods[0].progressive is None
    for record in live.periods[1:]:
        bundle, out = live.bundle(record.period - 1), tmp_path / f"{record.period}.parquet"
        done = dlrm("predict", bundle, logs[record.period - 1], "--out", out, "--columns", "label,item,city")
        assert done.returncode == 0, done.stderr
        frame = pl.read_parquet(out)
        scores = pl.read_parquet(live.day(record.period) / "scores.parquet")
        assert scores["prediction"].to_list() == frame["prediction"].to_list()
        known = known_rows(frame, Bundle.open(bundle))
        assert 0 < known.sum() < len(known)
        for rows, metrics in (
            (np.ones(len(known), bool), record.progressive.all),
            (known, record.progressive.known),
            (~known, record.progressive.unseen),
        ):
            labels, predictions = frame["label"].to_numpy()[rows], frame["prediction"].to_numpy()[rows].astype(float)
            assert (metrics["rows"], metrics["clicks"]) == (len(labels), labels.sum())
            # Of two logits that round to the same prediction it is known which is greater: a pair is 1e-6.
            assert metrics["auc"] == pytest.approx(roc_auc_score(labels, predictions), abs=1e-5)
            logloss, rate = log_loss(labels, predictions), labels.mean()
            assert metrics["logloss"] == pytest.approx(logloss, abs=1e-6)
            assert metrics["ne"] == pytest.approx(logloss / log_loss(labels, np.full(len(labels), rate)), abs=1e-6)
            assert metrics["calibration"] == pytest.approx(predictions.mean() / rate, abs=1e-6)
            assert metrics["auc_low"] < metrics["auc"] < metrics["auc_high"]
        items = frame["item"].is_in(vocabulary_of(bundle, "item"))
        assert record.features["item"].unseen_fraction == pytest.approx(1 - items.mean())
        assert record.features["page"].unseen_fraction is None


def vocabulary_of(bundle, name):
    return pl.read_parquet(bundle / "vocabulary" / f"{name}.parquet")["value"].to_list()


def cells_of(record, column):
    """A column of a period's log, as text."""
    return [line.split("\t")[column] for line in Path(record.logs[0].path).read_text().splitlines()]


def known_rows(frame, bundle):
    known = [frame[name].is_in(vocabulary_of(bundle.path, name)).to_numpy() for name in ("item", "city")]
    return known[0] & known[1]


def test_a_published_period_has_its_bundle_its_delta_and_its_record(three_days, tmp_path):
    live = LiveModel.open(three_days)
    assert live.current == 3
    assert str((three_days / "current").readlink()) == "bundles/0003"
    for record in live.periods:
        assert record.published
        assert record.gate.passed
        assert record.base == (record.period - 1 or None)
        assert record.rows == 2_000
        assert record.clicks == cells_of(record, 0).count("1")
        dataset = Dataset.open(live.day(record.period) / "dataset")
        assert record.gate.rows == dataset.splits["val"].rows
        assert record.features["item"].num_embeddings == dataset.num_embeddings["item"]
        assert record.features["item"].admitted > 0
        bundle = Bundle.open(live.bundle(record.period))
        assert (bundle.name, bundle.manifest.period) == ("clicks", record.period)
        steps = ["score", "preprocess", "learn", "export", "check", "publish"]
        assert list(read_times(live.day(record.period))) == steps[record.base is None :]
        if record.delta_bytes is not None:
            apply_delta(live.bundle(record.base), live.delta(record.period), tmp_path / str(record.period))
            assert files_of(tmp_path / str(record.period)) == files_of(live.bundle(record.period))
    assert not list(three_days.rglob("draft.json"))


def test_the_gate_compares_the_same_rows_and_they_were_not_learnt_from(three_days, tmp_path):
    """The held-back rows of the log, by their labels; and the old model's metrics of them, from the scores."""
    live = LiveModel.open(three_days)
    record = live.periods[2]
    dataset = Dataset.open(live.day(3) / "dataset")
    held_back = pl.concat(pl.read_parquet(file.path) for file in dataset.splits["val"].files)
    assert record.gate.new["rows"] == record.gate.old["rows"] == held_back.height
    assert record.gate.new["clicks"] == record.gate.old["clicks"] == held_back["label"].sum()
    scores = pl.read_parquet(live.day(3) / "scores.parquet")
    # Each price is but once in the log.
    fitted = Bundle.open(live.bundle(3)).dense["price"]
    prices = fitted.of_numbers(np.array(cells_of(record, 1), float))
    places = [int(np.argmin(np.abs(prices - price))) for price in held_back["price"]]
    old = scores[places]
    assert record.gate.old["auc"] == pytest.approx(roc_auc_score(old["label"], old["prediction"]), abs=1e-6)
    assert record.gate.old["logloss"] == pytest.approx(log_loss(old["label"], old["prediction"]), abs=1e-6)
    predictor = Predictor.open(live.bundle(3))
    predict_file(predictor, RowsIn([Path(record.logs[0].path)], predictor.schema), tmp_path / "new.parquet")
    new = pl.read_parquet(tmp_path / "new.parquet")[places]
    clicked = old["label"].to_numpy() == 1
    losses = [-np.log(np.where(clicked, p, 1 - p)) for p in (one["prediction"].to_numpy() for one in (old, new))]
    increase = losses[1] - losses[0]
    assert record.gate.logloss_increase == pytest.approx(increase.mean(), abs=1e-6)
    error = increase.std(ddof=1) / len(increase) ** 0.5
    assert record.gate.logloss_increase_standard_error == pytest.approx(error, rel=1e-3)


def test_a_model_that_is_not_good_enough_is_kept_and_not_published(copied, logs, dlrm):
    done = dlrm("advance", copied, logs[3], "--gate.calibration", 0.01, 0.02, "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert not told["published"]
    assert "period 4 is not published: the calibration on" in done.stderr
    assert "outside 0.01 to 0.02. dlrm rollback" in done.stderr
    live = LiveModel.open(copied)
    assert (live.current, live.settings.gate.calibration) == (3, (0.01, 0.02))
    assert live.bundle(4).is_dir()
    before = files_of(copied)
    assert dlrm("advance", copied, logs[3]).returncode == 1  # the same log again: nothing is left to do
    assert files_of(copied) == before
    # The next period is learnt from the model that is published; a rollback publishes the other one.
    record = advance(copied, logs[4], settings=LiveSettings(gate=WIDE))
    assert (record.period, record.base, record.published) == (5, 3, True)
    assert dlrm("rollback", copied, 4).returncode == 0
    assert live.current == 4
    assert live.periods[3].published


def test_a_rollback_decides_what_is_learnt_from_next(copied, logs):
    rollback(copied, 2)
    live = LiveModel.open(copied)
    assert live.current == 2
    # The log of the third day once more. What was undone counts for no time: no value of the first day is too old.
    record = advance(copied, logs[2], settings=LiveSettings(expire_after=3))
    assert (record.period, record.base, record.features["item"].expired) == (4, 2, 0)
    assert record.progressive == live.periods[2].progressive
    # What comes of it is what came of it then.
    assert (live.bundle(4) / "weights.safetensors").read_bytes() == (
        live.bundle(3) / "weights.safetensors"
    ).read_bytes()


def test_a_period_is_what_the_single_functions_give_and_older_logs_are_replayed(copied, logs, tmp_path):
    record = advance(copied, logs[3], settings=LiveSettings(replay_periods=3, expire_after=2))
    assert record.features["item"].expired > 0
    live = LiveModel.open(copied)
    first, later = (
        CONFIG.model_copy(update={"warm_start": CONFIG.warm_start.model_copy(update={"checkpoint": "last"} | changes)})
        for changes in ({}, {"accumulator_decay": 1.0})  # once a period
    )
    options = PreprocessOptions(period=4, expire_after=2, vocabulary=live.day(3) / "dataset", extend_vocabulary=True)
    dataset = preprocess(logs[3], tmp_path / "today", with_split(SCHEMA, "random", 0.05, 0.0), options)
    source = live.day(3) / "run"
    for day in (1, 2):
        encoded = preprocess(
            logs[day],
            tmp_path / f"day-{day}",
            with_split(SCHEMA, "random", 0.0, 0.0),
            PreprocessOptions(vocabulary=dataset.path),
        )
        train(first if day == 1 else later, encoded, tmp_path / f"run-{day}", from_run=source)
        source = tmp_path / f"run-{day}"
    train(later, dataset, tmp_path / "run", from_run=source)
    export(tmp_path / "run", tmp_path / "clicks-4", options=ExportOptions(name="clicks", checkpoint="last"))
    found = files_of(live.bundle(4))
    assert files_of(tmp_path / "clicks-4") == found
    assert record.published
    assert not (live.day(4) / "replay").exists()
    (shutil.move(logs[1], tmp_path / "gone.tsv"))
    try:
        with pytest.raises(
            LiveError, match=r"log-1\.tsv: is not the log of period 2 any more, which replay_periods = 4"
        ):
            advance(copied, logs[4], settings=LiveSettings(replay_periods=4))
    finally:
        shutil.move(tmp_path / "gone.tsv", logs[1])


def test_rows_may_have_weights_other_labels_and_faults(logs, tmp_path):
    columns = (LabelColumn(name="click"), LabelColumn(name="buy"), WeightColumn(name="weight"), *SCHEMA.columns[1:])
    schema = SCHEMA.model_copy(update={"columns": columns})
    config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"label": "buy"})})
    rng, paths = random.Random(0), [tmp_path / f"day-{day}.tsv" for day in (0, 1)]
    for path, log in zip(paths, logs, strict=False):
        rows = (line.partition("\t") for line in log.read_text().splitlines())
        path.write_text("".join(f"{rng.choice('01')}\t{label}\t{rng.random():.3f}\t{row}\n" for label, _, row in rows))
    settings = LiveSettings(gate=WIDE, max_bad_rows=3)
    advance(tmp_path / "live", paths[0], config=config, schema=schema, settings=settings)
    good = paths[1].read_text()
    paths[1].write_text(good + "no row\nx\t1\t1\t2.0\t1\tUlm\t1\n")
    with pytest.raises(LiveError, match=r"train\.label is click, and the model of period 1 has learnt buy"):
        advance(tmp_path / "live", paths[1], config=CONFIG)
    with pytest.raises(LogError, match="2,001 rows of the log can be scored, and 2,000 can be learnt from"):
        advance(tmp_path / "live", paths[1])
    paths[1].write_text(good + "no row\n0\tx\t1\t2.0\t1\tUlm\t1\n")
    record = advance(tmp_path / "live", paths[1], restart=True)
    scores = pl.read_parquet(tmp_path / "live/days/0002/scores.parquet")
    assert scores["prediction"].is_null().to_list() == [False] * 2_000 + [True] * 2
    scores = scores.head(2_000)
    logloss = log_loss(scores["buy"], scores["prediction"], sample_weight=scores["weight"])
    assert record.progressive.all["logloss"] == pytest.approx(logloss, abs=1e-6)
    assert record.progressive.all["rows"] == record.rows == 2_000
    assert record.clicks == scores["buy"].sum()


def test_values_expire_and_new_ones_get_their_ids(logs, tmp_path):
    """A fifth of the items is gone each day: with expiry the table stays as large as the values that are in use."""
    settings = LiveSettings(gate=WIDE, expire_after=2)
    records = [advance(tmp_path / "clicks", log, config=CONFIG, schema=SCHEMA, settings=settings) for log in logs[:4]]
    items = [set(cells_of(record, 2)) for record in records]
    for before, record in pairwise(records):
        seen, now = record.features["item"], before.features["item"]
        assert seen.values_in_use == now.values_in_use + seen.admitted - seen.expired
    for day in (1, 2, 3):
        item = records[day].features["item"]
        assert item.admitted == len(items[day] - items[day - 1])
        assert item.values_in_use == len(items[day] | items[day - 1])
    assert [record.features["item"].expired for record in records] == [0, 0, 20, 20]
    assert records[3].features["item"].num_embeddings == records[2].features["item"].num_embeddings
    assert records[3].features["page"].values_in_use is None


def test_rows_are_counted_over_the_periods_that_the_model_has_learnt(logs, tmp_path):
    """A refused period among the first ones, whose values no model knows, costs no value of the others its count."""
    of_learnt = LiveSettings(gate=WIDE, admit_over=3, min_count=45)
    refused = LiveSettings(gate=GateSettings(calibration=(0.01, 0.02)))
    for name, days in (("plain", (0, 1, 2)), ("gap", (0, 4, 1, 2))):
        for day in days:
            settings = refused if day == 4 else of_learnt
            advance(tmp_path / name, logs[day], config=CONFIG, schema=SCHEMA, settings=settings)
    plain, gap = (LiveModel.open(tmp_path / name) for name in ("plain", "gap"))
    assert (gap.current, gap.periods[-1].base) == (4, 3)
    assert 0 < plain.periods[-1].features["item"].admitted < 100
    tables = [
        pl.read_parquet(day / "dataset" / "vocabulary" / "item.parquet", columns=["value", "count", "id"])
        for day in (plain.day(3), gap.day(4))
    ]
    assert tables[0].equals(tables[1])
    weights = [bundle / "weights.safetensors" for bundle in (plain.bundle(3), gap.bundle(4))]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_old_runs_and_bundles_are_removed_but_never_the_current_ones(copied, logs, dlrm):
    live = LiveModel.open(copied)
    rollback(copied, 1)
    keep = LiveSettings(keep_runs=1, keep_bundles=1, gate=GateSettings(calibration=(0.01, 0.02)))
    assert not advance(copied, logs[3], settings=keep).published
    assert [period for period in range(1, 5) if (live.day(period) / "run").exists()] == [1, 4]
    assert [period for period in range(1, 5) if live.bundle(period).exists()] == [1, 4]
    assert [record.period for record in live.periods] == [1, 2, 3, 4]
    assert (live.day(2) / "scores.parquet").exists()
    with pytest.raises(LiveError, match=r"bundle of period 3 was removed \(keep_bundles\); there are 1, 4"):
        rollback(copied, 3)
    shutil.rmtree(live.day(1) / "run")
    told = dlrm("rollback", copied, 1).stderr
    assert "current is period 1 now" in told
    assert "the run of period 1 was removed (keep_runs)" in told
    with pytest.raises(LiveError, match=r"0001/run: is not there any more.*roll back to one of 4"):
        advance(copied, logs[4])


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(copied, logs, dlrm, tmp_path):
    before = files_of(copied)
    done = dlrm("advance", copied, logs[3], "--dry-run", "--replay-periods", 2, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["period"], told["warnings"]) == (4, [])
    assert "period 4, learnt from the model of period 3" in done.stderr
    assert "before it the logs of period 3 again" in done.stderr
    assert files_of(copied) == before
    new = tmp_path / "new"
    done = dlrm("advance", new, logs[0], "--config", "quickstart", "--schema", copied / "schema.toml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "warning: schedule.decay_steps is 675: the rate falls again in every period" in done.stderr
    assert "period 1, learnt from nothing" in done.stderr
    assert not new.exists()


def test_inspect_lists_the_periods(three_days, dlrm):
    told = json.loads(dlrm("inspect", three_days, "--json").stdout)
    live = LiveModel.open(three_days)
    assert (told["live"], told["current"]) == (str(three_days), 3)
    assert [period["period"] for period in told["periods"]] == [1, 2, 3]
    assert all(told["periods"][0][name] is None for name in ("auc", "logloss", "ne", "calibration"))
    for period, record in zip(told["periods"][1:], live.periods[1:], strict=True):
        for name in ("rows", "auc", "logloss", "ne", "calibration"):
            assert period[name] == record.progressive.all[name]
        assert period["published"]
    assert told["unfinished"] is None


def test_a_report_has_all_periods_and_what_they_took(three_days, dlrm, tmp_path):
    out = tmp_path / "live.html"
    done = dlrm("report", three_days, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    assert json.loads(done.stdout) == {"live": str(three_days), "report": str(out), "bytes": len(page.encode())}
    header, *lines = tables_of(page)[-4:]
    lines = [dict(zip(header, line, strict=True)) for line in lines]
    assert [line["published"] for line in lines] == ["current", "yes", "yes"]
    seconds = [sum(step.seconds for step in read_times(three_days / "days" / f"000{n}").values()) for n in (3, 2, 1)]
    assert [line["seconds"] for line in lines] == [f"{value:,.1f}" for value in seconds]


def test_a_live_model_may_move_before_a_period_is_complete(copied, logs):
    """Runs know the run that they were started from by its place and by its checkpoint."""
    for name in ("0003", "0004"):  # after the run on the older log, and after that on the new one
        with pytest.raises(Killed):
            advance(copied, logs[3], settings=LiveSettings(replay_periods=2), train_by=partial(train_and_end, name))
        copied = copied.rename(copied.with_name(f"clicks-{name}"))
    assert advance(copied, logs[3]).published


def train_and_end(name, config, dataset, run, **arguments):
    train(config, dataset, run, **arguments)
    if run.parent.name == name:
        raise Killed


@pytest.mark.slow
def test_a_period_whose_process_died_is_resumed_with_the_bytes_that_it_would_have_had(copied, logs, tmp_path):
    config = CONFIG.model_copy(
        update={
            "train": CONFIG.train.model_copy(update={"epochs": 8}),
            "checkpoint": CONFIG.checkpoint.model_copy(update={"every_steps": 10}),
        }
    )
    (tmp_path / "longer.toml").write_text(config_toml(config))
    command = (logs[3], "--config", tmp_path / "longer.toml", "--nproc-per-node", 2)
    undisturbed = shutil.copytree(copied, tmp_path / "undisturbed" / "clicks", symlinks=True)
    code, output = Process(undisturbed, *command, verb=("advance",)).wait()
    assert code == 0, output
    process, run = Process(copied, *command, verb=("advance",)), copied / "days/0004/run"
    wait_until(lambda: checkpoints(run), process)
    os.kill(process.workers()[1], signal.SIGKILL)
    code, output = process.wait()
    assert code == 1
    assert "process 1 of 2 failed: it was ended by SIGKILL" in output
    assert LiveModel.open(copied).draft.done == ("score", "preprocess")
    code, output = Process(copied, *command, verb=("advance",)).wait()
    assert code == 0, output
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["warm_start"]["run"] == str(copied / "days/0003/run")
    found, expected = ({**files_of(folder), "days/0004/run/.lock": None} for folder in (copied, undisturbed))
    assert [name for name in {**found, **expected} if found.get(name) != expected.get(name)] == []


class Killed(BaseException):
    """Nothing catches it."""


def end_here(*_):
    raise Killed


def killed_at(monkeypatch, moment):
    """Let the process end before one of the changes that are seen on disk; counts them all."""
    moments = iter(range(1_000_000))

    def wrap(owner, name):
        change = getattr(owner, name)

        def changed(*args, **kwargs):
            if next(moments) == moment:
                raise Killed
            return change(*args, **kwargs)

        monkeypatch.setattr(owner, name, changed)

    for owner, names in (
        (LiveModel, ("write_draft", "switch", "tidy", "remove_period")),
        (PeriodRecord, ("write",)),
        (Path, ("rename", "replace")),
    ):
        for name in names:
            wrap(owner, name)
    return moments


def test_publishing_that_is_interrupted_between_any_two_changes_is_finished(copied, logs, monkeypatch, tmp_path):
    """From the moment that a candidate has been checked on: there kills at random seldom fall."""
    settings = LiveSettings(keep_runs=1, keep_bundles=2)
    config = CONFIG.model_copy(update={"logging": CONFIG.logging.model_copy(update={"every_steps": 7})})
    with monkeypatch.context() as patched:
        patched.setattr("torchdlrm.live.advance._Period._publish", end_here)
        with pytest.raises(Killed):
            advance(copied, logs[3], settings=settings, config=config)
    for name in (".live.toml.1a2b3c4d", "days/0004/.scores.parquet.1a2b3c4d", "days/.0005.removed"):
        (copied / name).touch()  # as a process leaves them that was killed while it wrote
    checked = shutil.copytree(copied, tmp_path / "checked", symlinks=True)
    assert LiveModel.open(checked).draft.done[-1] == "check"
    with monkeypatch.context() as patched:
        moments = killed_at(patched, -1)
        record = advance(copied, logs[3], config=config)
    expected, num_moments = files_of(copied), next(moments)
    assert record.published
    assert num_moments > 12
    assert [path.name for path in copied.rglob(".*") if path.name not in {".lock", ".metadata"}] == []
    for moment in range(num_moments):
        shutil.rmtree(copied)
        shutil.copytree(checked, copied, symlinks=True)
        with monkeypatch.context() as patched:
            killed_at(patched, moment)
            with pytest.raises(Killed):
                advance(copied, logs[3], config=config)
        assert advance(copied, logs[3], config=config) == record
        assert files_of(copied) == expected, moment


def steps_done(day):
    """How many steps of a period are complete, as the file says that is replaced meanwhile."""
    with suppress(FileNotFoundError):
        return len(json.loads((day / "draft.json").read_text())["done"])
    return 6 if (day / "period.json").exists() else 0


@pytest.mark.slow
def test_a_live_model_that_is_killed_ends_with_the_bytes_of_one_that_was_not(logs, tmp_path, seed):
    """kill -9 of `dlrm advance` at random moments over some days; the same command resumes."""
    rng = random.Random(seed)
    (tmp_path / "config.toml").write_text(config_toml(CONFIG))
    (tmp_path / "schema.toml").write_text(schema_toml(SCHEMA))
    folder, first_days = tmp_path / "clicks", logs[: NUM_DAYS if NUM_KILLS >= 20 else 2]
    for log in first_days:
        settings = LiveSettings(gate=WIDE, replay_periods=2, keep_runs=2)
        config, schema = tmp_path / "config.toml", tmp_path / "schema.toml"
        advance(folder, log, config=config, schema=schema, settings=settings)
    expected = files_of(folder)
    folder.rename(tmp_path / "untouched")

    command = ("--config", config, "--schema", schema, "--replay-periods", 2, "--keep-runs", 2)
    command += ("--gate.calibration", *WIDE.calibration, "--gate.max-logloss-increase", WIDE.max_logloss_increase)
    kills, num_killed = [rng.randrange(len(first_days)) for _ in range(NUM_KILLS)], 0
    for day, log in enumerate(first_days):
        for _ in range(kills.count(day)):
            process, steps = Process(folder, log, *command, verb=("advance",)), rng.randrange(6)
            while process.process.poll() is None and steps_done(folder / f"days/{day + 1:04d}") < steps:
                threading.Event().wait(0.01)
            threading.Event().wait(rng.choice((0.1, 1.0)) * rng.random())
            num_killed += process.kill_all()[0] == -signal.SIGKILL
        code, output = Process(folder, log, *command, verb=("advance",)).wait()
        assert code == 0, output
    assert num_killed >= NUM_KILLS / 2  # the others came when nothing was left to do
    found = files_of(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
