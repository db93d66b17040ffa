"""A run's folder: begun, damaged, and taken up with a dataset that has moved."""

import json
import shutil

import pytest

from torchdlrm.config import load_config
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import RunError
from torchdlrm.evaluation.report import report_page
from torchdlrm.training.run import Run

CONFIG = load_config(None, {})


@pytest.fixture
def begun(small_dataset, tmp_path):
    """A run that was started and is not locked."""
    Run(tmp_path / "run", CONFIG).start(small_dataset, world_size=1).close()
    return Run.open(tmp_path / "run")


@pytest.mark.parametrize("left", ["environment.json", ".environment.json.0123abcd", ".config.toml.0123abcd", ".lock"])
def test_what_a_first_start_has_left_that_found_the_disk_full_is_taken_up(left, small_dataset, tmp_path):
    """The config is written last: without it there is no run, and nothing in the folder that anybody would miss."""
    path = tmp_path / "run"
    path.mkdir()
    (path / left).write_text("{")
    Run(path, CONFIG).check(small_dataset)  # the command asks before it starts processes
    Run(path, CONFIG).start(small_dataset, world_size=3).close()
    assert Run.open(path).environment["world_size"] == 3
    assert {entry.name for entry in path.iterdir()} == {".lock", "environment.json", "config.toml"}


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "photos", "environment.json.bak"])
def test_a_folder_with_something_else_is_left_alone(name, small_dataset, tmp_path):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(RunError, match="is not empty and holds no run"):
        Run(tmp_path / "run", CONFIG).start(small_dataset, world_size=1)
    assert (tmp_path / "run" / name).is_dir()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b"\xff", b'{"dataset": 7}', b"[" * 100_000, b"\xef\xbb\xbf{}", None]
)
def test_a_damaged_environment_is_named(content, begun, small_dataset):
    path = begun.path / "environment.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    start = f"^{path}: " + ("damaged" if content is not None else "No such file")
    for reads in (
        lambda: begun.environment,
        lambda: begun.check(small_dataset),
        begun.open_dataset,
        lambda: Run(begun.path, CONFIG).start(small_dataset, world_size=1),
    ):
        with pytest.raises(RunError, match=start) as caught:
            reads()
        assert "put it back from a copy" in str(caught.value)


def test_a_dataset_that_has_moved_is_found_again_after_the_run_went_on_with_it(begun, small_dataset, tmp_path):
    assert begun.open_dataset().path == small_dataset.path
    moved = Dataset.open(shutil.copytree(small_dataset.path, tmp_path / "moved"))
    Run(begun.path, CONFIG).start(moved, world_size=2).close()
    assert begun.open_dataset().path == moved.path
    assert begun.environment["world_size"] == 1  # what it was begun with
    moved.path.rename(tmp_path / "again")
    with pytest.raises(RunError, match=f"its dataset is not at {moved.path} any more; say with `dataset` where it is"):
        begun.open_dataset()
    assert begun.open_dataset(tmp_path / "again").path == tmp_path / "again"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("plan.json", "[]", "plan.json"),
        ("plan.json", '{"format_version": 1, "tables": {"t": 7}}', "plan.json: damaged"),
        ("evaluation/val.json", "[1]", "val.json: damaged; remove it"),
        ("evaluation/val.json", "{", "val.json: damaged; remove it"),
    ],
)
def test_a_report_names_the_part_that_is_damaged(name, content, message, begun):
    (begun.path / "evaluation").mkdir()
    (begun.path / name).write_text(content)
    with pytest.raises(RunError, match=message):
        report_page(begun)


def test_metrics_that_are_damaged_are_left_out_of_a_report(begun):
    whole = {"split": "val", "step": 3, "rows": 300, "auc": 0.71234}
    lines = [b"\xff\xfe", b"7", b'{"split": "train"}', b'{"split": "val", "step": "x", "rows": 1}', b"[" * 100_000]
    (begun.path / "metrics.jsonl").write_bytes(b"\n".join([*lines, json.dumps(whole).encode()]))
    assert "<b>0.7123</b><span>val AUC, last</span>" in report_page(begun)


def test_a_run_of_a_version_that_called_keys_otherwise_is_opened_and_resumed(begun, small_dataset):
    written = begun.path / "config.toml"
    old = written.read_text().replace("\ndropout =", "\ndropout_share =").replace("reserved_fraction", "reserved_share")
    assert old != written.read_text()
    written.write_text(old)
    assert Run.open(begun.path).config == CONFIG
    assert not Run(begun.path, CONFIG).check(small_dataset)
