"""`dlrm train --profile`: traces that a browser opens, and a summary of what is in them."""

import json

import pytest

CONFIG = "criteo-small"


@pytest.mark.slow
def test_profile_of_two_processes(small_dataset, dlrm, tmp_path):
    run = tmp_path / "run"
    done = dlrm(
        *("train", CONFIG, "--dataset", small_dataset.path, "--run", run, "--nproc-per-node", 2, "--profile", "--json"),
        *("--train.max-steps", 30),
    )
    assert done.returncode == 0, done.stderr
    assert "of which hidden" in done.stderr
    assert "USDT" not in done.stderr
    profiles = json.loads((run / "profile" / "summary.json").read_text())
    assert [profile["rank"] for profile in profiles] == [0, 1]
    for profile in profiles:
        assert profile["num_steps"] == 20
        assert 0 <= profile["hidden_share"] <= 1
        assert 0 < profile["communication_ms_per_step"] < profile["ms_per_step"]
        parts = {"matrix products", "tables: look up", "tables: update", "dense optimizer", "interaction"}
        assert parts <= profile["ms_per_step_by_part"].keys()
        trace = json.loads((run / "profile" / f"rank-{profile['rank']}.json").read_text())
        products = [entry for entry in trace["traceEvents"] if entry.get("name") == "aten::addmm"]
        assert products
        assert len(products) % 20 == 0  # as many in each of the steps
        assert any(entry.get("name") == "gloo:all_to_all" for entry in trace["traceEvents"])
    json.loads(done.stdout)


def test_a_run_that_ends_early_profiles_what_there_was(small_dataset, dlrm, tmp_path):
    run = tmp_path / "run"
    done = dlrm(
        "train", CONFIG, "--dataset", small_dataset.path, "--run", run, "--profile", "--train.max-steps", 9, "--json"
    )
    assert done.returncode == 0, done.stderr
    (profile,) = json.loads((run / "profile" / "summary.json").read_text())
    assert profile["num_steps"] == 4
    assert profile["hidden_share"] is None


@pytest.mark.parametrize("key", ["--logging.profile_steps", "--logging.profile-steps"])
def test_the_number_of_profiled_steps_is_what_was_asked_for_however_the_key_is_spelt(
    small_dataset, monkeypatch, tmp_path, key
):
    from torchdlrm.cli.main import app
    from torchdlrm.training.processes import launch

    asked = []
    monkeypatch.setattr(launch, "launch", lambda _, job, **__: asked.append(job.args[0].logging.profile_steps))
    command = ["train", str(CONFIG), "--dataset", str(small_dataset.path), "--run", str(tmp_path / "run"), "--profile"]
    app([*command, key, "5"])
    assert asked == [5]
