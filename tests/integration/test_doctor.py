"""`dlrm doctor` where everything works, and where parts are broken."""

import json
import os

import pytest


@pytest.mark.slow
def test_where_everything_works_it_says_so_with_what_will_be_used(dlrm):
    done = dlrm("doctor", "--json", timeout_s=400, RANK="1", WORLD_SIZE="2")  # as within a job of torchrun
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["works"]
    assert {check["outcome"] for check in told["checks"]} == {"ok"}
    names = [check["name"] for check in told["checks"]]
    for name in ("all-to-all of 2 processes by gloo", "steps on the processor", "checkpoint", "bundle"):
        assert name in names
    assert told["uses"]["device"] == "cpu"
    assert told["packages"]["torch"] in done.stderr
    assert "everything works" in done.stderr


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
