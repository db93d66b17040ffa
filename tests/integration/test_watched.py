"""What a person sees of jobs: through a file, and on a terminal of 80 columns."""

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
from types import SimpleNamespace

import nbclient
import nbformat
import pytest

from helpers.command_server import DLRM, shared_server
from torchdlrm.progress import watched

TRAINING = ("--validation.every-steps", "25", "--logging.every-steps", "10", "--logging.tensorboard", "false")


@pytest.fixture
def on_a_terminal():
    """Runs the command or a script in a terminal of 80 columns: on_a_terminal(DLRM, ...) -> all that it was sent."""

    def run(*args):
        terminal, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color"}
        environment.pop("COLUMNS", None)
        with os.fdopen(inner, "r+b", buffering=0) as file:
            options = {"stdin": file, "stdout": file, "stderr": file, "env": environment}
            process = shared_server().start(args, **options)
        shown = b""
        try:
            while block := os.read(terminal, 1 << 16):
                shown += block
        except OSError:  # EIO: nobody holds the other end any more
            pass
        os.close(terminal)
        assert process.wait(timeout=60) == 0, shown
        return shown.decode()

    return run


def validations_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "val"]


def test_a_training_into_a_file_tells_its_begin_each_validation_and_its_end_in_plain_lines(
    small_dataset, dlrm, tmp_path
):
    run = tmp_path / "run"
    command = [DLRM, "train", "criteo-small", "--dataset", small_dataset.path, "--run", run, "--json", *TRAINING]
    done = shared_server().run(command, env={**os.environ, "COLUMNS": "200", "FORCE_COLOR": "1"})
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    told = [line for line in done.stderr.splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)]
    assert all("\x1b" not in line and "\r" not in line for line in told)
    texts = [line.partition(" ")[2] for line in told]
    assert texts[0] == "train: begins, 4,286 rows"
    assert re.fullmatch(r"train: done, 4,286 rows in \d+\.\d s(, [\d,]+ rows/s)?", texts[-1])
    best = 0.0
    for text, line in zip([text for text in texts if "val AUC" in text], validations_of(run), strict=True):
        mark = " best" if line["auc"] > best else ""
        best = max(best, line["auc"])
        assert text == (
            f"step {line['step']} epoch {line['step'] / 67:.2f} {line['rows']:>7,} rows  val AUC {line['auc']:.4f} "
            f"logloss {line['loss']:.4f} NE {line['ne']:.4f}{mark}"
        )
    done = dlrm("evaluate", run, "--split", "val+test", "--batch-size-global", 100)
    assert re.search(r"^\d\d:\d\d:\d\d evaluate: done, 714 rows in ", done.stderr, re.MULTILINE), done.stderr


def test_each_phase_of_a_preprocessing_into_a_file_begins_and_ends_with_a_line(small_log, dlrm, tmp_path):
    done = dlrm("preprocess", small_log, "--out", tmp_path / "dataset", "--json")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    told = re.findall(r"^\d\d:\d\d:\d\d (\w+: (?:begins|done), .*)$", done.stderr, re.MULTILINE)
    assert [text.split(",")[0] for text in told] == [
        f"{phase}: {what}" for phase in ("read", "count", "encode", "write") for what in ("begins", "done")
    ]
    assert re.fullmatch(r"read: begins, \S+ MB", told[0])
    assert re.fullmatch(r"write: done, 5,000 rows in \d+\.\d s(, [\d,]+ rows/s)?", told[-1])


def test_a_terminal_of_80_columns_keeps_the_validations_above_a_bar_that_fits(small_dataset, on_a_terminal, tmp_path):
    run = tmp_path / "run"
    shown = on_a_terminal(DLRM, "train", "criteo-small", "--dataset", small_dataset.path, "--run", run, *TRAINING)
    assert shown.index("train criteo-small on") < shown.index("it fits"), "what is done is said while torch loads"
    lines = [re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", shown)]
    kept = [line for line in lines if "val AUC" in line]
    assert [int(line.split()[1]) for line in kept] == [line["step"] for line in validations_of(run)]
    assert all(len(line) <= 80 for line in kept)
    bars = [line.rstrip() for line in lines if "━" in line and line.startswith("train")]
    assert bars, lines
    assert all(len(line) <= 80 and "…" not in line for line in bars)
    assert all(re.search(r" \d+ %  [\d,]+/4,286 rows  .*\d:\d\d:\d\d (gone|left)$", line) for line in bars), bars
    assert any(line.startswith("train: done, 4,286 rows in ") for line in lines)


def test_a_function_shows_its_progress_on_a_terminal_and_can_be_silenced(on_a_terminal, small_log, tmp_path):
    def of(name, more=""):
        script = tmp_path / f"{name}.py"
        out = str(tmp_path / name)
        script.write_text(f"from torchdlrm import preprocess; preprocess({str(small_log)!r}, {out!r}{more})")
        return script

    told = on_a_terminal(of("shown"))
    assert all(f"{phase}: done, " in told for phase in ("read", "count", "encode", "write"))
    assert on_a_terminal(of("silent", ", progress=False")) == ""
    done = shared_server().run([of("piped")])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_in_a_notebook_a_function_draws_a_bar_and_keeps_its_lines():
    cell = """
import time
from torchdlrm.progress import watched

with watched(progress=True) as listener:
    listener.start_phase("read", 10)
    listener.advance(4, loss="<0.5>")
    time.sleep(0.6)  # longer than from one picture to the next
    listener.note("a <note>")
    listener.advance(6)
"""
    pictures = []

    class Client(nbclient.NotebookClient):
        def process_message(self, message, *args):
            if message["msg_type"] == "update_display_data":
                pictures.append(message["content"]["data"]["text/html"])
            return super().process_message(message, *args)

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    Client(notebook, kernel_name="python3").execute()
    assert any('<progress value="4" max="10">' in picture and "loss &lt;0.5&gt;" in picture for picture in pictures)
    (output,) = notebook.cells[0].outputs
    assert re.fullmatch(r"<pre>a &lt;note&gt;\nread: done, 10 rows in .*</pre>", output["data"]["text/html"])


def test_an_ipython_without_a_kernel_is_no_notebook(monkeypatch, capfd):
    kernel = SimpleNamespace(IPKernelApp=SimpleNamespace(initialized=lambda: False))
    monkeypatch.setitem(sys.modules, "ipykernel.kernelapp", kernel)
    with watched(progress=True) as listener:
        listener.start_phase("read", 10)
        listener.advance(10)
    assert capfd.readouterr() == ("", "")
