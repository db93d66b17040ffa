"""A sweep ends with the same trials and the same best whatever kills it; processes that share it do each trial once."""

import json
import random
import signal
import threading

import pytest

from helpers.trainings import Process, wait_until
from torchdlrm import Callback, load_config, train
from torchdlrm.training.run import Run

CONFIG = """
[model]
embedding_dim = 8
dense_arch_layer_sizes = [16, 8]
over_arch_layer_sizes = [16, 1]
[train]
batch_size_global = 512
[validation]
every_steps = 2
[checkpoint]
every_steps = 2
[logging]
every_steps = 2
tensorboard = false
"""
SPACE = """
"dense_optimizer.learning_rate" = {{ low = 0.001, high = 0.1, log = true }}
"model.over_arch_layer_sizes" = {{ choices = [[16, 1], [32, 1]] }}
"train.dropout" = {{ low = 0.0, high = 0.2, step = 0.1 }}
[sweep]
trials = {trials}
finalists = {finalists}
seeds = 2
"""


@pytest.fixture(scope="module")
def command(small_dataset, tmp_path_factory):
    """The arguments of a sweep in a folder."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "config.toml").write_text(CONFIG)

    def make(out, trials, finalists=0):
        space = folder / f"space-{trials}-{finalists}.toml"
        space.write_text(SPACE.format(trials=trials, finalists=finalists))
        given = (folder / "config.toml", "--space", space, "--dataset", small_dataset.path, "--out", folder / out)
        return ("sweep", *given, "--json")

    return make


@pytest.fixture(scope="module")
def swept(command, dlrm):
    """What a sweep without an interruption has found, and its folder."""
    args = command("uninterrupted", 7, finalists=1)
    done = dlrm(*args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), args[args.index("--out") + 1], done.stderr


def without_times(found):
    trials = [{name: value for name, value in trial.items() if name != "seconds"} for trial in found["trials"]]
    return found | {"trials": trials}


def lines_of(journal):
    return len(journal.read_bytes().splitlines()) if journal.exists() else 0


def killed(args, kills, rng, signals=(signal.SIGKILL,)):
    """What a sweep has found that was ended so often, anywhere between two lines of its journal, and begun again."""
    out = args[args.index("--out") + 1]
    for number in range(kills):
        process = Process(*args[1:], verb=("sweep",))
        target = lines_of(out / "journal.log") + rng.randrange(8, 30)
        wait_until(lambda target=target: lines_of(out / "journal.log") >= target, process)
        threading.Event().wait(rng.random() * 0.1)
        process.process.send_signal(signals[number % len(signals)])
        code, output = process.wait()
        assert code in {-signal.SIGKILL, 130}, output
        if code == -signal.SIGKILL:  # while it wrote a line
            with (out / "journal.log").open("ab") as journal:
                journal.write(b'{"op_code":6,"worker_id":"a592f')
    code, output = Process(*args[1:], verb=("sweep",)).wait()
    assert code == 0, output
    return json.loads(output[output.index(b"{") if isinstance(output, bytes) else output.index("{") :].splitlines()[0])


def test_a_sweep_says_whether_the_best_is_better(swept, small_dataset, dlrm):
    found, out, told = swept
    assert [trial["trial"] for trial in found["trials"]] == [*range(7)]
    complete = [trial for trial in found["trials"] if trial["state"] == "complete"]
    best = max(complete, key=lambda trial: trial["auc"])
    assert found["best"] == best["trial"]
    assert {trial["state"] for trial in found["trials"]} == {"complete", "pruned"}
    assert sum(found["importance"].values()) == pytest.approx(1)
    assert {name: len(values) for name, values in found["repeated"].items()} == {"start": 2, f"{best['trial']:03}": 2}
    assert found["verdict"] == found["comparison"]["verdict"]
    assert found["verdict"] in told
    config = load_config(out / "best.toml")
    assert config.dense_optimizer.learning_rate == best["dense_optimizer.learning_rate"]
    assert list(config.model.over_arch_layer_sizes) == json.loads(best["model.over_arch_layer_sizes"])
    assert config.seed == 0
    again = train(config, small_dataset, out / "again", progress=False)
    assert again.summary.best_auc == best["auc"]
    page = (out / "report.html").read_text()
    for text in (
        found["verdict"],
        "What mattered",
        "dense_optimizer.learning_rate",
        "Trials",
        "seconds from its begin",
    ):
        assert text in page


def test_pruned_trials_end_early_and_others_are_whole_runs(swept):
    found, out, _ = swept
    for trial in found["trials"]:
        run = Run.open(out / "trials" / f"{trial['trial']:03}")
        steps = [int(path.name[5:]) for path in run.checkpoints.glob("step-*")]
        assert (max(steps) < 9) == (trial["state"] == "pruned")


def test_a_sweep_that_was_killed_ends_as_one_that_was_not(swept, command, seed):
    signals = (signal.SIGKILL, signal.SIGINT)
    found = killed(command("killed", 7, finalists=1), 2, random.Random(seed), signals)
    expected = without_times(swept[0])
    names = {"comparison", "verdict"}  # which name runs by their folders
    assert {k: v for k, v in without_times(found).items() if k not in names} == {
        k: v for k, v in expected.items() if k not in names
    }


def test_two_processes_share_the_trials(command):
    args = command("shared", 4)
    both = [Process(*args[1:], verb=("sweep",)) for _ in range(2)]
    for code, output in [process.wait() for process in both]:
        assert code == 0, output
    lines = [json.loads(line) for line in (args[args.index("--out") + 1] / "journal.log").read_text().splitlines()]
    ends = [line for line in lines if line["op_code"] == 6 and line["state"] != 0]  # states of trials, but for running
    assert sorted(line["trial_id"] for line in ends) == [*range(4)]
    assert len({line["worker_id"].split("-")[0] for line in ends}) == 2


def test_the_trial_of_a_process_that_dies_is_taken_over(command):
    args = command("taken-over", 3)
    journal = args[args.index("--out") + 1] / "journal.log"

    def states():
        lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
        return [(line["trial_id"], line["state"]) for line in lines if line["op_code"] == 6]

    first, second = (Process(*args[1:], verb=("sweep",)) for _ in range(2))
    wait_until(lambda: len({trial for trial, _ in states()}) > 1, first)
    first.kill_all()
    code, output = second.wait()
    assert code == 0, output
    assert sorted(trial for trial, state in states() if state != 0) == [0, 1, 2]


def test_another_sweep_in_the_same_folder_is_refused_with_both_values(swept, command, dlrm, tmp_path):
    _, out, _ = swept
    args = [*command("uninterrupted", 7, finalists=1)]
    other = tmp_path / "other.toml"
    other.write_text(args[3].read_text().replace("high = 0.1,", "high = 0.2,"))
    done = dlrm(*args[:3], other, *args[4:], "--train.negative-weight", 2)
    assert done.returncode == 2
    assert f"--out: {out} holds another sweep" in done.stderr
    assert "train.negative_weight: was 1.0, is 2.0" in done.stderr
    assert "high=0.1" in done.stderr
    assert "high=0.2" in done.stderr
    (tmp_path / "full" / "of").mkdir(parents=True)
    refused = dlrm(*args[:-2], tmp_path / "full", "--json")
    assert refused.returncode == 2
    assert "is not empty and holds no sweep" in refused.stderr


def test_a_trial_that_fails_does_not_end_the_sweep(small_dataset, command, dlrm, tmp_path):
    (tmp_path / "space.toml").write_text(
        '"dense_optimizer.learning_rate" = { choices = [1e38] }\n[sweep]\ntrials = 2\npruner = "NopPruner"\n'
    )
    args = [*command("failing", 7)]
    done = dlrm(*args[:3], tmp_path / "space.toml", *args[4:])
    assert done.returncode == 1
    assert "no trial has finished; the last one: " in done.stderr
    assert done.stderr.count("failed: ") == 3
    assert "the loss is nan" in done.stderr


def test_a_callback_stops_a_training_which_the_same_call_goes_on_with(small_dataset, tmp_path):
    class Stop(Callback):
        def on_validation(self, step, metrics):  # noqa: ARG002
            return "enough" if step == 2 else None

    (tmp_path / "config.toml").write_text(CONFIG)
    config = tmp_path / "config.toml"
    history = train(config, small_dataset, tmp_path / "run", callbacks=[Stop()], progress=False)
    assert (history.summary.stopped_because, history.summary.step) == ("enough", 2)
    assert history.summary.best_step == 2
    rest = train(config, small_dataset, tmp_path / "run", progress=False)
    assert (rest.summary.resumed_from_step, rest.summary.stopped_because) == (2, "finished")
