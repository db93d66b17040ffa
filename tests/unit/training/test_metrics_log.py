"""metrics.jsonl: what a resumed run keeps of it, and what is read of it."""

import json

from hypothesis import given
from hypothesis import strategies as st

from torchdlrm.training.log import MetricsLog, TrainingHistory, TrainingSummary, ending, read_metrics


def line(step, split="train", **more):
    return json.dumps({"step": step, "rows": 10 * step, "split": split} | more)


def resumed(path, text, from_step):
    (path / "metrics.jsonl").write_bytes(text)
    log = MetricsLog(path, from_step=from_step)
    log.on_end("finished")
    return (path / "metrics.jsonl").read_bytes()


def test_lines_beyond_the_step_and_a_last_line_that_was_cut_short_are_dropped(tmp_path):
    kept = [line(1), line(2), line(2, "val"), line(1)]  # by step, not by place
    text = "\n".join([*kept, line(3), line(4, "val"), line(2)[:-4]])
    assert resumed(tmp_path, text.encode(), 2) == ("\n".join(kept) + "\n").encode()


def test_what_is_no_line_of_metrics_is_dropped(tmp_path):
    text = b"\n".join([b"7", b"null", b"{}", b'{"step": "x"}', b"\xff\xfe", b"", line(1).encode()])
    assert resumed(tmp_path, text, 5) == line(1).encode() + b"\n"


@given(st.lists(st.integers(1, 30)), st.integers(0, 30), st.integers(0, 40))
def test_whatever_is_cut_off_the_rest_up_to_the_step_is_kept(tmp_path_factory, steps, from_step, cut):
    text = "".join(f"{line(step)}\n" for step in steps)
    left = text[: len(text) - cut]
    complete = [json.loads(found)["step"] for found in left.splitlines() if found.endswith("}")]
    found = resumed(tmp_path_factory.mktemp("run"), left.encode(), from_step).decode()
    assert [json.loads(text)["step"] for text in found.splitlines()] == [s for s in complete if s <= from_step]


def test_a_full_disk_costs_the_metrics_and_not_the_training(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = MetricsLog.__new__(MetricsLog)
    log._file = (tmp_path / "metrics.jsonl").open("a")
    log.on_log(3, {"rows": 30, "loss": 0.5})
    log.on_end("failed")
    assert "the metrics of step 3 could not be written" in caplog.text


def test_what_is_written_is_read_and_undefined_values_are_no_part_of_a_series(tmp_path):
    log = MetricsLog(tmp_path, from_step=0)
    with ending([log]):
        log.on_log(2, {"rows": 20, "auc": None, "loss": 0.5})
        log.on_validation(2, {"rows": 20, "auc": 0.75, "loss": 0.25})
        log.on_log(4, {"rows": 40, "auc": 0.7, "loss": 0.4})
    found = read_metrics(tmp_path / "metrics.jsonl")
    history = TrainingHistory(TrainingSummary(4, 40, 0, 1.0, 40.0, "finished", 0.75, 2, None), found)
    assert history.series("train", "loss") == [(2, 0.5), (4, 0.4)]
    assert history.series("train", "auc") == [(4, 0.7)]
    assert history.series("val", "auc") == [(2, 0.75)]
    assert read_metrics(tmp_path / "nothing") == []
