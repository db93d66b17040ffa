"""`dlrm doctor` where everything works, and where parts are broken."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest

from helpers.command_server import shared_server
from torchdlrm.cli.about import doctor
from torchdlrm.doctor import diagnose
from torchdlrm.doctor import probe as probe_module


@pytest.mark.slow
def test_where_everything_works_it_says_so_with_what_will_be_used(monkeypatch, capsys):
    def probe(command, **options):
        return shared_server().start([probe_module.__file__, *command[3:]], **options)

    # As everywhere, in a process that has loaded torch.
    monkeypatch.setattr(diagnose, "subprocess", SimpleNamespace(Popen=probe, TimeoutExpired=subprocess.TimeoutExpired))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():  # as within a job of torchrun
        monkeypatch.setenv(name, value)
    doctor(as_json=True)
    done = capsys.readouterr()
    told = json.loads(done.out)
    assert told["works"]
    assert {check["outcome"] for check in told["checks"]} == {"ok"}
    names = [check["name"] for check in told["checks"]]
    for name in ("all-to-all of 2 processes by gloo", "steps on the processor", "checkpoint", "bundle"):
        assert name in names
    assert told["uses"]["device"] == "cpu"
    assert told["packages"]["torch"] in done.err
    assert "everything works" in done.err


@pytest.mark.parametrize(
    ("broken", "signs"),
    [
        (
            "raise OSError('Could not load this library: config.so') from OSError('libnvidia-ml.so.1: cannot')",
            ["OSError: libnvidia-ml.so.1", "needs NVIDIA's driver"],
        ),
        ("import os; os.abort()", ["the process died by SIGABRT", "make install"]),
    ],
)
def test_a_broken_fbgemm_is_found_with_what_to_do_and_the_rest_is_still_told(broken, signs, dlrm, tmp_path):
    (tmp_path / "fbgemm_gpu.py").write_text(broken)
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    done = dlrm("doctor", "--json", PYTHONPATH=paths)
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    (failed,) = (check for check in told["checks"] if check["outcome"] == "failed")
    assert failed["name"] == "import fbgemm_gpu"
    assert [sign for sign in signs if sign not in f"{failed['told']} {failed['remedy']}"] == []
    assert told["machine"]["cores"]
    assert failed["remedy"] in done.stderr
    assert "Traceback" not in done.stderr
