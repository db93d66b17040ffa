"""The tutorials run from their first cell to the last in a folder of their own, and the site shows it."""

import re

import ipykernel_launcher
import nbformat
import pytest

from helpers.command_server import REAL_PROCESSES, folder_of_commands, shared_server
from website.notebooks import execute, executed, notebooks

# What a tutorial says in its text, and its cells must show.
SHOWN = {
    "comparing": r"seed-0: AUC [+-]0\.\d+, from [+-]0\.\d+ to [^$]*standard error by rows 0\.\d+, by seeds 0\.",
    "criteo": r"\d\d% of what any model could reach above guessing",
    "live-week": r"day 5: AUC 0\.7\d+ \(0\.7\d+ to 0\.7\d+\) before it was learnt[^$]*held-back rows were clicked",
    "own-model": r"attention AUC 0\.7\d+, [\d,]+ rows/s",
    "planning": r"yes, it fits: 20 tables[^$]*what would make it fit",
    "your-own-log": r'"predictions":\[0\.\d+\][^$]*exit code 0',
}


def printed(notebook):
    """What the cells have printed, and the values that they ended with."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text") or f"{output.get('data', {}).get('text/plain', '')}\n" for output in outputs)


def test_each_tutorial_says_what_it_shows():
    assert {path.stem for path in notebooks()} == SHOWN.keys()


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_a_tutorial_has_no_outputs_in_the_repository(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


def fork_kernel(command, env, cwd, **_):
    return shared_server().start([ipykernel_launcher.__file__, *command[3:]], env=env, cwd=cwd, start_new_session=True)


@pytest.fixture
def commands(monkeypatch):
    """The folder of `dlrm`; processes of it, and the notebooks' own, have loaded torch already."""
    if REAL_PROCESSES:
        yield None
        return
    monkeypatch.setattr("jupyter_client.provisioning.local_provisioner.launch_kernel", fork_kernel)
    with folder_of_commands() as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_a_tutorial_runs(path, commands, tmp_path):
    execute(path, tmp_path, commands)
    notebook = executed(path)
    assert re.search(SHOWN[path.stem], printed(notebook)), printed(notebook)
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", ()))
