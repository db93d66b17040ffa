"""Training and evaluation as functions: what callbacks and callers are told, and what a call leaves behind."""

import logging
import os
import signal
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import distributed as dist

from helpers.trainings import logged
from torchdlrm import Callback, evaluate, load_config, train
from torchdlrm.config import config_toml
from torchdlrm.errors import RunError
from torchdlrm.training.checkpoint import find_damage
from torchdlrm.training.job import preview_training

SMALL = {
    "model.embedding_dim": "8",
    "model.dense_arch_layer_sizes": "[16, 8]",
    "model.over_arch_layer_sizes": "[16, 1]",
    "train.batch_size_global": "512",
    "logging.every_steps": "2",
    "logging.tensorboard": "false",
}


def small(**more):
    return load_config(None, SMALL | {name.replace("__", "."): str(value) for name, value in more.items()})


class Listing(Callback):
    def __init__(self):
        self.logged, self.validated, self.saved, self.ends = [], [], [], []

    def on_log(self, step, metrics):
        self.logged.append((step, dict(metrics)))

    def on_validation(self, step, metrics):
        self.validated.append((step, dict(metrics)))

    def on_checkpoint(self, step, path):
        self.saved.append((step, path.name, find_damage(path)))

    def on_end(self, outcome):
        self.ends.append(outcome)


def without_time(line):
    return {key: value for key, value in line.items() if key not in {"time", "split", "step"}}


def test_a_callback_is_told_what_metrics_jsonl_has_and_every_checkpoint_when_it_is_complete(small_dataset, tmp_path):
    listing = Listing()
    config = small(train__max_steps=6, validation__every_steps=3, checkpoint__every_steps=2)
    history = train(config, small_dataset, tmp_path / "run", callbacks=[listing])
    for told, split in ((listing.logged, "train"), (listing.validated, "val")):
        written = logged(tmp_path / "run", split)
        assert told == [(line["step"], without_time(line)) for line in written]
    assert [step for step, _ in listing.logged] == [2, 4, 6]
    assert [step for step, _ in listing.validated] == [3, 6]
    assert [name for _, name, _ in listing.saved] == [f"step-{step:08d}" for step, _, _ in listing.saved]
    assert {2, 4, 6} <= {step for step, _, _ in listing.saved}
    assert [damage for _, _, damage in listing.saved if damage is not None] == []
    assert listing.ends == ["finished"]
    assert history.summary.step == 6
    assert history.series("val", "auc") == [(step, metrics["auc"]) for step, metrics in listing.validated]


def test_the_history_of_a_resumed_run_begins_with_the_run(small_dataset, tmp_path):
    for max_steps in (2, 4):
        history = train(small(train__max_steps=max_steps), small_dataset.path, tmp_path / "run")
    assert history.summary.resumed_from_step == 2
    assert [step for step, _ in history.series("train", "loss")] == [2, 4]
    assert history.metrics == logged(tmp_path / "run", "train", "val")


def test_a_complete_run_is_not_taken_for_one_with_other_settings(small_dataset, dlrm, tmp_path):
    run = tmp_path / "run"

    def files():
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    done = train(small(train__max_steps=2), small_dataset, run, progress=False)
    written = files()
    harmless = {"logging__every_steps": 1, "validation__batch_size_global": 64, "loader__prefetch_batches": 2}
    for same in ({}, harmless, {"logging__tensorboard": "true", "validation__every_steps": 1}):
        again = train(small(**{"train__max_steps": 2, **same}), small_dataset, run, progress=False)
        assert (again.summary.step, again.metrics) == (2, done.metrics)
        assert files() == written
    other = {"table_optimizer__learning_rate": 0.2, "train__dropout": 0.1, "logging__every_steps": 1}
    config = small(train__max_steps=2, **other)
    for refused in (
        lambda: train(config, small_dataset, run, progress=False),
        lambda: preview_training(config, small_dataset, run, world_size=2, local_world_size=2),
    ):
        with pytest.raises(RunError) as caught:
            refused()
        for text in (
            "table_optimizer.learning_rate: was 0.05, is 0.2; the run is complete",
            "train.dropout: was 0.0, is 0.1; the run is complete",
            "logging.every_steps: was 2, is 1; would do no harm",
            "another `run`, or `restart`",
            "raise train.max_steps, which is 2, to continue",
        ):
            assert text in str(caught.value)
    (tmp_path / "other.toml").write_text(config_toml(config))
    command = ("train", tmp_path / "other.toml", "--dataset", small_dataset.path, "--run", run)
    for more in ((), ("--dry-run",)):
        told = dlrm(*command, *more)
        assert told.returncode == 2
        assert "another --run, or --restart" in told.stderr
    assert files() == written
    on = train(small(train__max_steps=3, **other), small_dataset, run, progress=False)
    assert (on.summary.resumed_from_step, on.summary.step) == (2, 3)
    assert load_config(run / "config.toml").table_optimizer.learning_rate == 0.2
    assert train(small(train__max_steps=3), small_dataset, run, restart=True).summary.resumed_from_step == 0
    assert load_config(run / "config.toml").table_optimizer.learning_rate == 0.05


@pytest.mark.parametrize("looks", [{}, {"stop__target_auc": 0.99}])
def test_when_a_complete_run_validated_matters_where_it_decides(looks, small_dataset, tmp_path):
    config = small(train__max_steps=2, validation__every_steps=1, **looks)
    train(config, small_dataset, tmp_path / "run", progress=False)
    less = small(train__max_steps=2, validation__every_steps=1, validation__max_rows=100, **looks)
    with pytest.raises(RunError, match=r"validation\.max_rows: was not set, is 100") if looks else nullcontext():
        train(less, small_dataset, tmp_path / "run", progress=False)


def test_what_a_callback_raises_ends_the_training_and_all_are_told(small_dataset, tmp_path):
    class Breaking(Callback):
        def on_log(self, step, metrics):  # noqa: ARG002
            msg = "of a callback"
            raise ZeroDivisionError(msg)

    before, after = Listing(), Listing()
    with pytest.raises(ZeroDivisionError, match="of a callback"):
        train(small(), small_dataset, tmp_path / "run", callbacks=[before, Breaking(), after])
    assert (before.ends, after.ends) == (["failed"], ["failed"])
    assert (len(before.logged), len(after.logged)) == (1, 0)


def process_wide():
    """What a library shares with whoever calls it."""
    return {
        "threads": torch.get_num_threads(),
        "random numbers": torch.get_rng_state().tolist(),
        "matrix precision": torch.get_float32_matmul_precision(),
        "filters": list(warnings.filters),
        "levels": {name: logging.getLogger(name).level for name in LOGGERS},
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "excepthook": threading.excepthook,
        "environment": dict(os.environ),
        "has a group": dist.is_initialized(),
    }


LOGGERS = ("torchrec.distributed.planner.types", "torch.fx._symbolic_trace", "torch.distributed.elastic")


def test_training_and_evaluation_work_twice_and_leave_the_process_as_it_was(small_dataset, tmp_path):
    torch.manual_seed(7)
    before = process_wide()
    for name in ("first", "second"):
        config = small(train__max_steps=3, train__num_threads=1, logging__tensorboard="true")
        assert train(config, str(small_dataset.path), str(tmp_path / name)).summary.step == 3
        found = evaluate(tmp_path / name, split="val+test")
        assert (found["split"], found["step"]) == ("val+test", 3)
        assert found["rows"] == small_dataset.splits["val"].rows + small_dataset.splits["test"].rows
    assert process_wide() == before
    assert evaluate(tmp_path / "first", small_dataset, "val") == evaluate(tmp_path / "second", split="val")


def test_a_process_group_that_exists_is_used_and_left_as_it_is(small_dataset, tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        before = set(dist.distributed_c10d._world.pg_map)
        train(small(train__max_steps=2), small_dataset, tmp_path / "run")
        evaluate(tmp_path / "run", split="val")
        assert set(dist.distributed_c10d._world.pg_map) == before
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
