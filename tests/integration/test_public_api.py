"""The package as users import it, each time in an interpreter of its own."""

import subprocess
import sys

import torchdlrm


def test_importing_the_package_imports_no_torch():
    code = "import sys, torchdlrm; torchdlrm.load_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_package_that_is_missing_is_one_sentence():
    code = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name == "torchrec":
            raise ModuleNotFoundError("No module named 'torchrec'", name=name)
sys.meta_path.insert(0, Gone())
from torchdlrm import train
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr
    first = "ModuleNotFoundError: torchrec is not installed: pip install 'torchdlrm[train]' && pip install --no-deps"
    assert told.splitlines()[-1].startswith(f"{first} 'torchrec==")
    assert "During handling" not in told
    assert "sharding" not in told


def test_python_runs_the_command_as_a_module():
    told = subprocess.run([sys.executable, "-m", "torchdlrm", "-V"], capture_output=True, text=True, check=True).stdout
    assert told == f"{torchdlrm.__version__}\n"


def test_importing_the_package_takes_a_tenth_of_a_second_at_most():
    code = "import time; start = time.process_time(); import torchdlrm; print(time.process_time() - start)"
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(times) < 0.1


def test_public_names_are_what_they_are_after_every_module_was_imported_which_says_nothing():
    """A sub-package of the same name would take a function's place the moment that it is imported."""
    code = """
import importlib, pkgutil, types, torchdlrm
before = {name: getattr(torchdlrm, name) for name in torchdlrm.__all__}
assert None not in before.values() and before.keys() <= set(dir(torchdlrm))
for module in pkgutil.iter_modules(torchdlrm.__path__):
    importlib.import_module(f"torchdlrm.{module.name}")
importlib.import_module("torchdlrm.training.job"), importlib.import_module("torchdlrm.evaluation.evaluate")
from torchdlrm import evaluate, preprocess, synthesize, train
assert all(isinstance(function, types.FunctionType) for function in (evaluate, preprocess, synthesize, train))
assert all(getattr(torchdlrm, name) is value for name, value in before.items())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_command_itself_loads_nothing_that_starts_threads():
    """It would be late with `--help`, and a thread from before does not block the signals that `dlrm serve` blocks."""
    code = "import sys, torchdlrm.cli.main, torchdlrm.cli.serve; print(*{'numpy', 'polars', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_the_command_ends_without_looking_through_what_it_has_loaded():
    code = """
import atexit, gc
from torchdlrm.cli.main import main
atexit.register(lambda: print(gc.get_freeze_count() > 10_000))  # called after what `main` registers
main()
"""
    done = subprocess.run([sys.executable, "-c", code, "config"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"
