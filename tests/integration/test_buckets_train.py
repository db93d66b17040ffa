"""Training by URLs alone, on hosts that share nothing but a bucket: the same bytes as on a disk."""

import logging
import os
import shutil

import pytest

from helpers.buckets import bytes_of, far_away
from helpers.days import SMALL
from helpers.trainings import two_nodes
from torchdlrm.config import load_config
from torchdlrm.data.dataset import Dataset
from torchdlrm.evaluation.evaluate import evaluate
from torchdlrm.loader.loader import Loader
from torchdlrm.storage import mirror, objects
from torchdlrm.storage.places import located
from torchdlrm.training.job import train
from torchdlrm.training.log import Callback

CONFIG = load_config(
    "criteo-small",
    SMALL
    | {"checkpoint.every_steps": "5", "train.max_steps": "20", "logging.every_steps": "1"}
    | {"checkpoint.asynchronous": "false"},
)


@pytest.fixture
def many_parts(bucket, many_groups):
    """The URL of `many_groups`."""
    _put(many_groups.path, f"{bucket}/dataset")
    return f"{bucket}/dataset"


def _put(folder, url):
    for path in folder.rglob("*"):
        if path.is_file():
            objects.write(f"{url}/{path.relative_to(folder).as_posix()}", path)


def _last_checkpoint(run):
    path = max((run / "checkpoints").glob("step-*"))
    return {f"{path.name}/{file.name}": file.read_bytes() for file in path.iterdir()}


def _published(url):
    """The last checkpoint, after seeing that none lacks its record."""
    found = bytes_of(f"{url}/checkpoints")
    steps = {name.partition("/")[0] for name in found}
    assert {name.partition("/")[0] for name in found if name.endswith("/checkpoint.json")} == steps
    return {name: content for name, content in found.items() if name.startswith(max(steps))}


def test_a_run_in_a_bucket_goes_on_with_an_empty_cache_and_ends_with_the_same_bytes(
    bucket, many_groups, many_parts, tmp_path, dlrm
):
    train(CONFIG, many_groups, tmp_path / "run", progress=False)
    url = f"{bucket}/run"

    class Stopping(Callback):
        def on_checkpoint(self, *_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, many_parts, url, callbacks=[Stopping()], progress=False)
    assert _published(url)
    assert "metrics.jsonl" in objects.listed(url)
    objects.write(f"{url}/checkpoints/step-00000015/__0_0.distcp", b"of a host that was killed while it published")
    shutil.rmtree(tmp_path / "cache")
    assert train(CONFIG, many_parts, url, progress=False).summary.resumed_from_step >= 5
    assert _published(url) == _last_checkpoint(tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    assert evaluate(url, split="val", progress=False)["rows"] == many_groups.splits["val"].rows
    done = dlrm("inspect", url)
    assert f"dataset {many_parts}" in done.stderr
    assert str(tmp_path / "cache") not in done.stderr + objects.read(f"{url}/environment.json").decode()


def test_hosts_that_train_together_share_nothing_but_the_bucket(bucket, small_dataset, small_run, tmp_path):
    _put(small_dataset.path, f"{bucket}/dataset")
    options = ("--logging.tensorboard", "false", "--checkpoint.every-steps", "30")
    caches = [{"TORCHDLRM_CACHE": str(tmp_path / name)} for name in ("first", "second")]
    nodes = two_nodes(
        *("--dataset", f"{bucket}/dataset", "--run", f"{bucket}/run", *options),
        verb=("train", "criteo-small"),
        environments=caches,
    )
    outputs = [node.wait() for node in nodes]
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert {f"step-00000067/__{rank}_0.distcp" for rank in range(2)} <= _published(f"{bucket}/run").keys()
    assert not [*(tmp_path / "second/s3").rglob("*.distcp")], "its disk would fill"
    here = located(f"{bucket}/run")
    expected = evaluate(small_run, progress=False)["auc"]
    assert evaluate(here, progress=False)["auc"] == pytest.approx(expected, abs=1e-4)


def test_training_goes_on_while_the_bucket_is_away(bucket, s3, many_groups, many_parts, tmp_path, monkeypatch, caplog):
    train(CONFIG, many_groups, tmp_path / "run", progress=False)
    monkeypatch.setenv("TORCHDLRM_STORAGE_PATIENCE_S", "0.2")
    with far_away(s3) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.environment["AWS_ENDPOINT_URL"])

        class Away(Callback):
            """Of the first checkpoint all is written, of the second nothing."""

            def on_checkpoint(self, *_):
                faults.answer = (403, "ExpiredToken")

            def on_log(self, step, _):
                if step >= 14:
                    faults.answer = None

        with caplog.at_level(logging.WARNING, "torchdlrm"):
            train(CONFIG, many_parts, f"{bucket}/run", callbacks=[Away()], progress=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.environment["AWS_ENDPOINT_URL"])
    assert "the checkpoint of step 10 could not be written, training continues without it" in caplog.text
    assert "credentials have expired" in caplog.text
    assert _published(f"{bucket}/run") == _last_checkpoint(tmp_path / "run")


def test_parts_are_fetched_once_and_the_cache_stays_bounded(bucket, s3, many_groups, many_parts, tmp_path, monkeypatch):
    def rows(dataset):
        loader = Loader(dataset, "train", batch_size_global=300, epochs=2)
        return [batch.labels.tolist() for batch in loader]

    expected = rows(many_groups)
    with far_away(s3) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.environment["AWS_ENDPOINT_URL"])
        assert rows(Dataset.open(many_parts)) == expected
        parts = [line for line in faults.requests if line.startswith("GET") and "/train/part" in line]
        assert len(parts) == len({*parts}) == len(many_groups.splits["train"].files)
        shutil.rmtree(tmp_path / "cache")
        limit = 3 * max(file.path.stat().st_size for file in many_groups.splits["train"].files)
        monkeypatch.setenv("TORCHDLRM_CACHE_BYTES", str(limit))
        assert rows(Dataset.open(many_parts)) == expected
        held = [path.stat().st_size for path in located(many_parts).rglob("*.parquet")]
        assert sum(held) <= limit


def test_a_part_that_is_another_one_in_the_bucket_by_now_is_fetched_again(many_parts, tmp_path):
    path = Dataset.open(many_parts).splits["train"].files[0].path
    assert mirror.fetch_missing(path).stat().st_size > 10
    objects.write(f"{many_parts}/train/{path.name}", b"another")
    os.utime(tmp_path / "cache/stamps/s3" / many_parts.removeprefix("s3://") / "train" / path.name, (0, 0))
    mirror.fetch(located(many_parts), ())
    assert mirror.fetch_missing(path).read_bytes() == b"another"
