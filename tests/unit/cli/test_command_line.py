"""What `dlrm` answers to a command line that is wrong, in this process: one line, exit code 2, and what to do."""

import sys
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console

import torchdlrm.cli.main
import torchdlrm.cli.terminal
from torchdlrm.cli.main import app, main
from torchdlrm.cli.options import in_options
from torchdlrm.config import load_config, shipped_config_names
from torchdlrm.errors import ConfigError, TrainingError
from torchdlrm.judged import interval
from torchdlrm.judging.slices import Slice

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def dlrm_says(monkeypatch, capsys):
    """Runs `dlrm ARGS`: its exit code, and what it wrote on standard error."""
    monkeypatch.setattr(torchdlrm.cli.main, "console", Console(stderr=True, highlight=False, width=80))
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["dlrm", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("train", "dlrm train: --dataset is missing; dlrm train --help shows all options"),
        ("train criteo-small --datset d --run r", "dlrm train: --dataset is missing; did you mean it by --datset?"),
        ("train --dataset d --run r", "CONFIG is missing: name a TOML file, or one of criteo-1tb, criteo-1tb-dcn, "),
        ("train criteo-smal --dataset d --run r", "criteo-smal: no such config; name a TOML file, or one of "),
        (
            "train criteo-small --dataset d --run r --freeze dense --train.freeze tables",
            "--freeze: is --train.freeze by ",
        ),
        ("predict", "dlrm predict: BUNDLE is missing; dlrm predict --help"),
        ("predict b", "dlrm predict: ROWS is missing; dlrm predict --help"),
        ("help trian", "dlrm trian: there is no such command; did you mean train?"),
        ("help bench stpe", "dlrm bench stpe: there is no such command; did you mean step?"),
        ("trian", 'Unknown command "trian". Did you mean "train"?'),
        ("plan --tables criteo-1tb --max-rows 5", "--max-rows: is called --max-embeddings now"),
        ("plan --tables criteo-1tb --devices 0", "--devices: must be at least 1, got 0"),
        ("serve b --prot 9", "Unknown option: --prot. Did you mean --port?"),
        ("preprocess log --out y --max-rows 9", "--max-rows: is called --max-embeddings now"),
        ("preprocess log --out y --memory 1X", "Invalid value for --memory: must be a size above zero such as 80GB, "),
        ("preprocess log --out y --min-count 0", "--min-count: must be at least 1, got 0"),
        (
            "advance live log --gate.max-logloss-increase -1",
            "--gate.max-logloss-increase: must be greater than or equal to 0, got",
        ),
        ("advance live", "LOGS: give the files of a period's log, or in place of them --watch"),
        ("rollback live monday", "PERIOD: must be a whole number, got 'monday'"),
        ("synthesize --rows x --out y", "--rows: must be a whole number, got 'x'"),
        ("plan --tables criteo-1tb --alpha x", "--alpha: must be a number, got 'x'"),
        (
            "export run --out b --precision int16",
            "--precision: must be one of float32, float16, int8, int4, auto, not 'int16'; did you mean int8?",
        ),
        ("download criteo --out d", "LOG: must be one of criteo-kaggle, criteo-1tb, not 'criteo'\n"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_helps(args, message, dlrm_says):
    code, told = dlrm_says(*args.split())
    assert code == 2
    assert told.startswith(f"error: {message}"), told
    assert told.count("\n") == 1


@pytest.mark.parametrize("args", [["help"], ["help", "train"], ["help", "bench", "step"]])
def test_help_is_a_command_too(args, capsys):
    app(args, exit_on_error=False)
    of_command = capsys.readouterr().out
    with suppress(SystemExit):
        app([*args[1:], "--help"], exit_on_error=False)
    assert capsys.readouterr().out == of_command != ""


def test_the_list_of_commands_has_a_line_of_each_and_the_help_of_one_says_all(monkeypatch, capsys):
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def shown(*args):
        monkeypatch.setattr(sys, "argv", ["dlrm", *args])
        with suppress(SystemExit):
            main()
        return " ".join(capsys.readouterr().out.split())

    assert "Otherwise the exit code is 1" not in shown("--help")
    assert shown("advance", "--help").count("Otherwise the exit code is 1") == 1
    assert shown("help", "train").count("Ctrl-C save and exit") == 1
    assert shown("bench", "step", "-h").count("matrix products alone") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_options_can_be_completed_in_a_shell(shell, capsys):
    app(["completion", shell], exit_on_error=False)
    script = capsys.readouterr().out
    assert all(word in script for word in ("preprocess", "nproc-per-node", "delta-to"))


def test_a_path_with_a_blank_can_be_pasted_from_the_line_that_says_what_comes_next(capsys, monkeypatch):
    monkeypatch.setattr(torchdlrm.cli.terminal, "console", Console(stderr=True, width=80))
    torchdlrm.cli.terminal.say_next("dlrm evaluate {} --split {}", Path("my run"), "test")
    assert capsys.readouterr().err == "next: dlrm evaluate 'my run' --split test\n"


def test_arguments_that_the_library_names_become_options_of_the_command():
    said = "`max_rows`: or `bundle`, `rows` and `log_format`, but `auc` and `dlrm verify` are what they are"
    assert in_options(said, app, ["verify", "b"]) == (
        "--rows: or BUNDLE, ROWS and --format, but `auc` and `dlrm verify` are what they are"
    )


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it(dlrm_says, monkeypatch):
    for name, remedy in (("torchrec", "--no-deps 'torchrec"), ("fbgemm_gpu", "fbgemm-gpu-cpu")):
        monkeypatch.setattr(torchdlrm.cli.main, "app", _importing(name))
        monkeypatch.setitem(sys.modules, name, None)
        code, told = dlrm_says("train")
        assert code == 2
        assert told.startswith(f"error: {name} is not installed: pip install "), told
        assert remedy in told


def test_the_traceback_of_a_process_that_failed_unexpectedly_follows_the_message(dlrm_says, monkeypatch):
    def app(*_, **__):
        error = TrainingError("process 1 of 2 failed: ZeroDivisionError: by zero")
        error.add_note("Traceback (most recent call last): [...]")
        raise error

    monkeypatch.setattr(torchdlrm.cli.main, "app", app)
    code, said = dlrm_says("train")
    assert code == 1
    assert said.splitlines() == [
        "failed: process 1 of 2 failed: ZeroDivisionError: by zero",
        "Traceback (most recent call last): [...]",
    ]


def test_a_build_of_fbgemm_that_cannot_be_loaded_is_explained_in_one_line(dlrm_says, monkeypatch):
    def app(*_, **__):
        cause = OSError("libtorch_cuda.so: cannot open shared object file")
        raise OSError("Could not load this library: /venv/fbgemm_gpu/fbgemm_gpu_config.so") from cause

    monkeypatch.setattr(torchdlrm.cli.main, "app", app)
    code, told = dlrm_says("train")
    assert code == 1
    assert told.startswith("failed: Could not load this library: /venv/fbgemm_gpu/fbgemm_gpu_config.so: libtorch_cuda")
    assert "dlrm doctor" in told
    assert told.count("\n") == 1


def _importing(name):
    def app(*_, **__):
        __import__(name)

    return app


def test_a_config_goes_by_its_name():
    shipped = {"criteo-small", "criteo-kaggle", "criteo-1tb", "criteo-1tb-dcn", "quickstart"}
    assert shipped <= set(shipped_config_names())
    assert load_config("criteo-small") == load_config(CONFIGS / "criteo-small.toml")
    with pytest.raises(ConfigError, match=r"criteo-smal: no such config; .*; did you mean criteo-small\?"):
        load_config("criteo-smal")


def test_a_config_can_be_printed_to_start_from(capsys, tmp_path):
    from torchdlrm.cli.about import config

    config("criteo-small")
    mine = tmp_path / "mine.toml"
    mine.write_text(capsys.readouterr().out)
    assert load_config(mine) == load_config("criteo-small")
    config()
    assert "table_optimizer.learning_rate" in capsys.readouterr().err.replace("\n", "")


def test_names_of_slices_break_where_they_are_too_long_and_are_not_cut(capsys, monkeypatch):
    monkeypatch.setattr(torchdlrm.cli.terminal, "console", Console(stderr=True, width=80, highlight=False))
    estimates = dict.fromkeys(("click_rate", "auc", "logloss", "ne", "calibration"), interval(0.4, 0.01))
    name = "city = Ulm, hour = 17 to 23, device = one with a name of many words"
    torchdlrm.cli.terminal.print_slices([Slice(name, 1_234, 0.3, estimates, "ne", 3.0, 1e-6).as_json()])
    table = capsys.readouterr().err
    assert "…" not in table
    assert {*name.split()} <= {*table.split()}
    assert "<0.0001" in table
