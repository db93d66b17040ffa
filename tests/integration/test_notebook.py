"""In a notebook, what the stages return shows itself as a table."""

import html
import re
import shutil

from torchdlrm import Bundle, Dataset, Run, TrainingHistory, evaluate
from torchdlrm.notebook import notebook_view
from torchdlrm.training.log import TrainingSummary


def text_of(view):
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", view)))


def test_names_are_escaped_and_missing_values_are_left_out():
    view = notebook_view("run <b>", {"a": None, "rows": 12345, "AUC": 0.75}, [{"x": None, "y": "<i>"}])
    assert "run &lt;b&gt;" in view
    assert "&lt;i&gt;" in view
    assert text_of(view).split() == ["run", "<b>", "rows", "12,345", ",", "AUC", "0.7500", "x", "y", "<i>"]


def test_a_dataset_shows_its_splits(small_dataset):
    shown = text_of(Dataset.open(small_dataset.path)._repr_html_())
    assert f"train {small_dataset.splits['train'].rows:,} 0." in shown
    assert f"rows of tables {sum(small_dataset.num_embeddings.values()):,}" in shown


def test_a_run_shows_its_evaluations(small_run, small_dataset, tmp_path):
    shutil.copytree(small_run, tmp_path / "run")
    metrics = evaluate(small_run, small_dataset.path, split="val", progress=False)
    run = Run.open(tmp_path / "run")
    run.write_evaluation("val", metrics)
    shown = text_of(run._repr_html_())
    assert "interaction dot , embedding dimension" in shown
    assert f"{metrics['rows']:,} {metrics['auc']:.4f}" in shown


def test_a_bundle_shows_its_files(small_bundle):
    bundle = Bundle.open(small_bundle)
    shown = text_of(bundle._repr_html_())
    assert bundle.version in shown
    assert all(name in shown for name in bundle.manifest.files)


def test_a_training_shows_its_last_validations():
    lines = [{"split": "val", "step": step, "auc": 0.5 + step / 1000, "loss": 0.4321, "ne": None} for step in range(20)]
    summary = TrainingSummary(19, 4000, 0, 1.0, 4000.0, "finished", 0.519, 19, None)
    shown = text_of(TrainingHistory(summary, [{"split": "train", "step": 3}, *lines])._repr_html_())
    assert "best AUC 0.5190 step" in shown
    assert "10 0.4321 0.5100" in shown
    assert "0.5090" not in shown  # ten validations, and not eleven
