"""The Python blocks of the documents run, page by page, in a folder that has what the page says is given.

A comment before the first block of a page, `<!-- given: log.tsv, dataset, run, bundle, server -->`, names it.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.command_server import shared_server

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in DOCUMENTS if BLOCK.search(page.read_text())]

OWN_SCHEMA = """
name = "clicks"
separator = ","
columns = [
    { role = "label", name = "click" },
    { role = "dense", name = "price", kind = "float", transform = "standardize" },
    { role = "sparse", name = "city", kind = "string" },
]
"""


def own_log(path):
    rows = (f"{int(i % 7 == 0)},{i % 90 / 4},city {i % 11}" for i in range(400))
    path.write_text("\n".join(["click,price,city", *rows]) + "\n")


def give(name, folder, request):
    """Put what a page takes for granted into the folder."""
    if name == "log.tsv":
        shutil.copy(request.getfixturevalue("small_log"), folder / name)
    elif name == "clicks.csv":
        own_log(folder / name)
    elif name == "my.toml":
        (folder / name).write_text(OWN_SCHEMA)
    elif name == "dataset":
        (folder / name).symlink_to(request.getfixturevalue("small_dataset").path)
    else:
        shutil.copytree(request.getfixturevalue({"run": "small_run", "bundle": "small_bundle"}[name]), folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_the_python_blocks_of_a_page_run(page, request, tmp_path):
    text = page.read_text()
    code = "\n".join(BLOCK.findall(text))
    given = re.search(r"<!-- given: (.*?) -->", text[: BLOCK.search(text).start()])
    for name in given[1].split(", ") if given else ():
        if name == "server":
            server = request.getfixturevalue("serve")(request.getfixturevalue("small_bundle"), "--name", "bundle")
            code = code.replace("http://localhost:8080", server.url).replace("localhost:8080", server.url[7:])
        else:
            give(name, tmp_path, request)
    script = tmp_path / "page.py"
    script.write_text(f"import warnings\nwarnings.simplefilter('error', UserWarning)\n{code}")
    done = shared_server().run([script], cwd=tmp_path)
    assert done.returncode == 0, f"{page.name}:\n{done.stderr}"


@pytest.mark.slow
def test_what_the_pages_import_is_imported_without_a_warning():
    """In a process that has loaded nothing yet."""
    code = "\n".join(block for page in PAGES for block in BLOCK.findall(page.read_text()))
    imports = sorted(set(re.findall(r"^(?:import|from) .*$", code, re.MULTILINE)))
    assert "import torch" in imports
    command = [sys.executable, "-W", "error::UserWarning", "-c", "\n".join(imports)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
