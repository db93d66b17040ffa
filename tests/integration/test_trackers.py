"""Metrics reach the trackers that a config names; the optional ones run where they are installed."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from torchdlrm.config import load_config
from torchdlrm.training.metrics_log import MetricsLog

CONFIG = Path(__file__).parents[2] / "configs" / "criteo-small.toml"
OPTIONS = ("--logging.every-steps", 5, "--logging.tensorboard", "false", "--table-optimizer.learning-rate", 0.04)


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs pip install 'torchdlrm[{package}]'")


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_tracker_is_told_the_figures_of_metrics_jsonl_and_closed(tmp_path):
    class Tracker:
        told, closed = (), False

        def log(self, step, values):
            self.told += ((step, values),)

        def close(self):
            self.closed = True

    trackers = [Tracker(), Tracker()]
    log = MetricsLog(tmp_path, from_step=0, trackers=trackers)
    log.write({"step": 7, "rows": 70, "split": "val", "auc": 0.75, "ne": float("nan")})
    log.close()
    for tracker in trackers:
        assert tracker.told == ((7, {"val/auc": 0.75}),)
        assert tracker.closed
    assert [line["step"] for line in lines(tmp_path)] == [7]


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
    assert history == [(line["step"], line["loss"]) for line in lines(run) if line["split"] == "train"]


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
    from torchdlrm.training.trackers import open_trackers

    assert open_trackers(tmp_path, load_config(None, {"logging.tensorboard": "false"}), from_step=0) == []
    (tracker,) = open_trackers(tmp_path, load_config(None), from_step=0)
    tracker.log(3, {"train/loss": 0.5})
    tracker.close()
    assert list((tmp_path / "tensorboard").iterdir())
