"""Metrics reach the trackers that a config names; the optional ones run where they are installed."""

import json
import os
import shutil
import signal
import threading
from importlib.util import find_spec

import pytest

from helpers.trainings import CONFIG, logged
from torchdlrm.config import load_config
from torchdlrm.errors import ConfigError, Interrupted, TrainingError
from torchdlrm.training.job import train
from torchdlrm.training.log import MetricsLog, ending
from torchdlrm.training.trackers import TRACKERS, Tracker, check_trackers, open_trackers

OPTIONS = ("--logging.every-steps", 5, "--logging.tensorboard", "false", "--table-optimizer.learning-rate", 0.04)


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs pip install 'torchdlrm[{package}]'")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "finished"),
        (Interrupted("asked to"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (TrainingError("the loss is nan"), "failed"),
    ],
)
def test_every_tracker_is_told_the_metrics_of_metrics_jsonl_and_how_it_ended(error, outcome, tmp_path):
    class Listing(Tracker):
        told, outcome = (), None

        def log(self, step, values):
            self.told += ((step, values),)

        def on_end(self, outcome):
            self.outcome = outcome
            if self is trackers[-1]:  # the first to be told
                msg = "unreachable"
                raise ConnectionError(msg)

    trackers = [Listing(), Listing()]

    def train():
        callbacks = [MetricsLog(tmp_path, from_step=0), *trackers]
        with ending(callbacks):
            for callback in callbacks:
                callback.on_validation(7, {"rows": 70, "auc": 0.75, "ne": None})
            if error is not None:
                raise error

    with pytest.raises(ConnectionError):
        train()
    for tracker in trackers:
        assert tracker.told == ((7, {"val/auc": 0.75}),)
        assert tracker.outcome == outcome
    (line,) = logged(tmp_path)
    assert list(line) == ["step", "rows", "split", "auc", "ne", "time"]
    assert (line["step"], line["rows"], line["split"], line["auc"], line["ne"]) == (7, 70, "val", 0.75, None)


def test_a_tracker_is_one_class(small_dataset, tmp_path, monkeypatch):
    """Registered, it is named in the config, receives what is logged, and is given its id when the run is resumed."""

    class Listing(Tracker):
        def __init__(self, run_path, config, run_id):
            self.run_id = run_id or config.logging.experiment
            self.path = run_path / "listing.txt"

        def log(self, step, values):
            with self.path.open("a") as file:
                file.write(f"{self.run_id} {step} {values.get('val/auc', '')}\n")

        def on_end(self, outcome):
            self.log(0, {"val/auc": outcome})

    monkeypatch.setitem(TRACKERS, "json", Listing)  # a package of that name is installed
    options = {"logging.every_steps": "5", "logging.tensorboard": "false", "logging.trackers": "json"}
    for experiment, max_steps in (("first", "5"), ("second", "10")):
        settings = {**options, "logging.experiment": experiment, "train.max_steps": max_steps}
        train(load_config(CONFIG, settings), small_dataset, tmp_path / "run")
    told = [line.split() for line in (tmp_path / "run" / "listing.txt").read_text().splitlines()]
    assert {line[0] for line in told} == {"first"}
    assert [line[1:] for line in told if line[1] == "0"] == [["0", "finished"]] * 2
    steps = [str(line["step"]) for line in logged(tmp_path / "run")]
    assert [line[1] for line in told if line[1] != "0"] == steps
    with pytest.raises(ConfigError, match=r"logging\.trackers: there is no tracker jsn; did you mean json\?"):
        check_trackers(["jsn"])


class Ending:
    """Listens to a training and ends it after some rows, in a way."""

    def __init__(self, way, after_rows=1_000):
        self.way, self.rows_left = way, after_rows

    def start_phase(self, name, total, unit="rows", done=0):
        pass

    def note(self, line):
        pass

    def advance(self, amount, **figures):  # noqa: ARG002
        self.rows_left -= amount
        if self.rows_left < 0 and self.way == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.rows_left < 0 and self.way == "exception":
            msg = "of the listener"
            raise ZeroDivisionError(msg)


ENDINGS = {"signal": Interrupted, "nan": TrainingError, "exception": ZeroDivisionError}


def train_to_an_end(way, dataset, run, **options):
    """Train until something ends it before its time."""
    settings = {"logging.every_steps": "1", "train.batch_size_global": "64", "logging.profile_steps": "200"}
    if way == "nan":
        settings |= {
            "dense_optimizer.name": "sgd",
            "dense_optimizer.learning_rate": "1e30",
            "schedule.warmup_steps": "9",
        }
    with pytest.raises(ENDINGS[way]):
        train(load_config(CONFIG, settings | options), dataset, run, progress=Ending(way))


@pytest.mark.parametrize("way", ENDINGS)
def test_events_of_a_training_that_did_not_finish_are_on_disk_and_nothing_of_it_lives_on(way, small_dataset, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    before = set(threading.enumerate())
    train_to_an_end(way, small_dataset.path, tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    written = events.Scalars("train/loss")
    assert b"[table_optimizer]" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    expected = [line["step"] for line in logged(tmp_path / "run")]
    assert [event.step for event in written] == expected
    assert expected
    assert {thread for thread in set(threading.enumerate()) - before if "Dummy" not in thread.name} == set()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(name, small_dataset, dlrm, tmp_path):
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    run = tmp_path / "run"
    done = dlrm("train", CONFIG, "--dataset", small_dataset.path, "--run", run, "--logging.trackers", name)
    assert done.returncode == 2
    assert f"{name} is not installed; pip install 'torchdlrm[{name}]'" in done.stderr
    assert not run.exists()


@needs("mlflow")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_holds_the_metrics_and_the_config_of_a_run_that_was_taken_up_again(
    small_dataset, dlrm, tmp_path, monkeypatch
):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder will do; a database would need more packages
    store = (tmp_path / "store").as_uri()
    run = tmp_path / "run"
    for max_steps in (10, 20):
        done = dlrm(
            *("train", CONFIG, "--dataset", small_dataset.path, "--run", run, *OPTIONS, "--logging.trackers", "mlflow"),
            *("--train.max-steps", max_steps),
            MLFLOW_TRACKING_URI=store,
        )
        assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("torchdlrm")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["table_optimizer.learning_rate"] == "0.04"
    history = [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, "train/loss")]
    assert history == [(line["step"], line["loss"]) for line in logged(run) if line["split"] == "train"]


@needs("mlflow")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("way", "status"), [("signal", "KILLED"), ("nan", "FAILED"), ("exception", "FAILED")])
def test_mlflow_is_told_how_a_training_ended(way, status, small_dataset, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    train_to_an_end(way, small_dataset.path, tmp_path / "run", **{"logging.trackers": "mlflow"})
    run_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    assert mlflow.MlflowClient().get_run(run_id).info.status == status


@needs("mlflow")
@pytest.mark.slow
def test_a_tracker_that_cannot_be_opened_is_told_in_one_message(small_dataset, dlrm, tmp_path):
    run = tmp_path / "run"
    done = dlrm(
        *("train", CONFIG, "--dataset", small_dataset.path, "--run", run, *OPTIONS, "--logging.trackers", "mlflow"),
        MLFLOW_TRACKING_URI="no-such-scheme://x",
    )
    assert done.returncode == 2
    assert "logging.trackers: mlflow cannot be used: " in done.stderr
    assert "Traceback" not in done.stderr


@needs("wandb")
@pytest.mark.slow
def test_wandb_keeps_a_run_on_disk_when_offline(small_dataset, dlrm, tmp_path):
    run = tmp_path / "run"
    for max_steps in (10, 20):
        done = dlrm(
            *("train", CONFIG, "--dataset", small_dataset.path, "--run", run, *OPTIONS, "--logging.trackers", "wandb"),
            *("--train.max-steps", max_steps),
            WANDB_MODE="offline",
        )
        assert done.returncode == 0, done.stderr
    run_id = json.loads((run / "trackers.json").read_text())["wandb"]
    parts = list((run / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(parts) == 2
    assert all(b"val/auc" in part.read_bytes() for part in parts)


def test_tensorboard_can_be_left_out(tmp_path):
    assert open_trackers(tmp_path, load_config(None, {"logging.tensorboard": "false"}), from_step=0) == []
    (tracker,) = open_trackers(tmp_path, load_config(None), from_step=0)
    tracker.log(3, {"train/loss": 0.5})
    tracker.on_end("finished")
    assert list((tmp_path / "tensorboard").iterdir())


def test_events_that_cannot_be_written_are_told_once_and_the_training_goes_on(tmp_path, caplog, monkeypatch):
    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)  # where TensorBoard's thread would tell it too
    before = set(threading.enumerate())
    (tracker,) = open_trackers(tmp_path, load_config(None), from_step=0)
    threads = set(threading.enumerate()) - before
    shutil.rmtree(tmp_path / "tensorboard")  # as a full disk: its thread cannot write any more
    for step in range(1_000):
        tracker.log(step, {"train/loss": 0.5})
    tracker.on_end("failed")
    for thread in threads:
        thread.join()
    assert [record.message.partition(":")[0] for record in caplog.records if record.name == "torchdlrm"] == [
        "TensorBoard's last events could not be written, and no more will be"
    ]
    assert tracebacks == []
    assert threading.excepthook == tracebacks.append


@needs("mlflow")
def test_mlflow_holds_each_step_once_after_a_kill(tmp_path, monkeypatch):
    """The process that resumes tells the steps after its checkpoint again."""
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    config = load_config(None, {"logging.tensorboard": "false", "logging.trackers": "mlflow"})
    for from_step, until_step in ((0, 7), (4, 10)):
        (tracker,) = open_trackers(tmp_path, config, from_step=from_step)
        for step in range(from_step + 1, until_step + 1):
            tracker.log(step, {"train/loss": 1 / step} | ({"val/auc": 0.5} if step == 7 else {}))
    run_id = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    for name, expected in (("train/loss", [*range(1, 11)]), ("val/auc", [7])):
        assert [metric.step for metric in mlflow.MlflowClient().get_metric_history(run_id, name)] == expected
