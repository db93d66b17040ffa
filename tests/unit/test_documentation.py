"""What the documents say is what the code does."""

import re
import shlex
from pathlib import Path

import pytest

from torchdlrm.config import configuration_markdown, load_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_configuration_document_lists_every_setting():
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration_markdown(), "run: make docs"


def commands():
    """Every `dlrm ...` line of the code blocks, without what stands in brackets or is left out by dots."""
    for document in DOCUMENTS:
        for block in re.findall(r"```(?:sh|console)\n(.*?)```", document.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.split("#")[0].strip()
                if command.startswith("dlrm ") and "..." not in command:
                    yield pytest.param(command, id=f"{document.name}: {command[:60]}")


@pytest.mark.parametrize("command", list(commands()))
def test_documented_commands_parse(command, monkeypatch):
    """The verb exists, its options too; configs that are named are there and their overrides valid."""
    from cyclopts import App

    from torchdlrm.cli.main import app

    monkeypatch.chdir(ROOT)
    tokens = shlex.split(command)[1:]
    function, bound, _ = App.parse_args(app, tokens, print_error=False, exit_on_error=False)
    assert function.__module__.startswith("torchdlrm.cli.")
    if tokens[0] == "train":
        from torchdlrm.cli.options import split_config

        load_config(*split_config(bound.arguments["config"]))


def test_every_verb_is_in_the_readme():
    from torchdlrm.cli.main import app

    verbs = {name for name in app if not name.startswith("-")}
    readme = (ROOT / "README.md").read_text()
    assert {verb for verb in verbs if f"dlrm {verb}" not in readme} == set()


def test_the_readmes_file_tree_names_every_module():
    readme = (ROOT / "README.md").read_text()
    package = ROOT / "src" / "torchdlrm"
    missing = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
        and path.name not in readme
        and not any(f"{folder.name}/" in readme for folder in path.relative_to(package).parents)
    ]
    assert missing == []


def test_files_that_documents_name_are_there():
    package = ROOT / "src" / "torchdlrm"
    rooms = "|".join(path.name for path in package.iterdir() if path.is_dir())
    missing = {
        f"{document.name}: {name}"
        for document in DOCUMENTS
        for name in re.findall(rf"`((?:{rooms})/[\w/]+\.py)`", document.read_text())
        if not (package / name).is_file()
    }
    assert missing == set()
