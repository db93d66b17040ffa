"""What the documents say is what the code does."""

import ast
import re
import shlex
import textwrap
from pathlib import Path

import pytest
from pydantic import BaseModel

from torchdlrm.config import configuration_markdown, load_config
from torchdlrm.live.settings import LiveSettings

ROOT = Path(__file__).parents[2]
FRONT_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
DOCUMENTS = [*FRONT_PAGES, *sorted((ROOT / "docs").rglob("*.md"))]


def anchors_of(document):
    """What a link behind `#` may name: headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_what_is_there(document):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        is_outside = re.match(r"\w+:", link)
        if not is_outside and (not target.exists() or (anchor and anchor not in anchors_of(target))):
            broken.append(link)
    assert broken == []


def test_the_configuration_document_lists_every_setting():
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration_markdown(), "run: make docs"


def test_the_document_of_live_models_lists_every_setting():
    def rows(section, prefix=""):
        for name, field in section.model_fields.items():
            if isinstance(field.default, BaseModel):
                yield from rows(type(field.default), f"{name}.")
            else:
                default = "" if field.default is None else field.default
                yield f"{prefix}{name}", " to ".join(map(str, default)) if isinstance(default, tuple) else str(default)

    text = (ROOT / "docs" / "live.md").read_text().partition("\n## Settings\n")[2]
    assert dict(re.findall(r"^\| `([\w.]+)` \| (.*?) ?\|", text, re.MULTILINE)) == dict(rows(LiveSettings))


def test_the_schedules_of_live_models_call_commands_that_are_there():
    from cyclopts import App

    from torchdlrm.cli.main import app

    text = (ROOT / "docs" / "live.md").read_text().partition("\n## Every day\n")[2].partition("\n## Monitoring\n")[0]
    called = re.findall(r"/opt/torchdlrm/bin/dlrm (\w+) ([\w/]+)", text)
    assert called == [("advance", "live"), ("advance", "live"), ("serve", "/srv/ads/live/current"), ("advance", "live")]
    for verb, folder in called:
        App.parse_args(app, [verb, folder, *["log.tsv"] * (verb == "advance")], print_error=False, exit_on_error=False)
    dag = re.search(r'^    """.*?(?=^\S)', text, re.MULTILINE | re.DOTALL)[0]
    assert [type(node).__name__ for node in ast.parse(textwrap.dedent(dag)).body][-1] == "With"


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


def test_the_page_of_commands_has_every_verb():
    from torchdlrm.cli.main import app

    verbs = {name for name in app if not name.startswith("-")}
    page = (ROOT / "docs" / "commands.md").read_text()
    assert {verb for verb in verbs if f"dlrm {verb}" not in page} == set()


def test_the_file_tree_names_every_module():
    tree = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "src" / "torchdlrm"
    missing = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
        and path.name not in tree
        and not any(f"{folder.name}/" in tree for folder in path.relative_to(package).parents)
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


def words_of(path):
    """The text of a file as a reader has it: line breaks are spaces, and quotes of a document are left out."""
    text = path.read_text()
    if path.suffix == ".md":
        text = re.sub(r"^>.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\s*\n[\s#]*", " ", text)


def test_documents_and_code_name_who_does_what():
    pages = [path for suffix in ("py", "js", "html", "toml") for path in (ROOT / "src").rglob(f"*.{suffix}")]
    vague = re.compile(r"\b(whoever|nobody|somebody|of before|known again)\b", re.IGNORECASE)
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in [*DOCUMENTS, *pages]
        for match in vague.finditer(words_of(path))
    }
    assert found == set()
