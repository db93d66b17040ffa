"""The site of the documents: what `make site` would refuse, without building it."""

import datetime
import re

import duckdb
import nbformat
import pytest

from website import navigation, rules
from website.build import SITE, built_wrong
from website.pages import DOCS, ROOT, notebook_page, pages
from website.pictures import IMAGES, pictures
from website.python import public_names

# What people type into the search field; findings of newcomers.
SEARCHED = [
    "notebook", "early stopping", "feature importance", "hyperparameter search", "confidence interval", "multi-node",
    "glossary", "streaming", "price", "S3", "Kafka", "unseen", "class imbalance", "online learning", "/dev/shm",
]  # fmt: skip


@pytest.fixture(scope="module")
def site():
    """The text of each page, made of docs/ and of the code."""
    return pages()


def test_every_page_is_listed_every_public_name_documented_and_every_block_of_code_known(site):
    assert rules.problems(site) == []


def test_pages_link_pages_alone(site):
    """A link out of docs/ would lead nowhere on the site; what it names has become a page."""
    leading_out = [
        link
        for text in site.values()
        for link in re.findall(r"\]\(((?:\.\./)+(?:examples/\w+\.py|tests)[^)]*)\)", text)
    ]
    assert leading_out == []


def test_the_pictures_are_those_of_the_scripts():
    assert {path.name: path.read_text() for path in IMAGES.glob("*.svg")} == pictures(), "run: make docs"


def test_the_reference_has_every_command_option_and_public_name(site):
    from torchdlrm.cli.main import app

    commands = site["reference/commands.md"]
    assert {verb for verb in app if not verb.startswith("-") and f"\n## dlrm {verb}\n" not in commands} == set()
    assert "- **`--table-bytes STR`** " in commands
    reference = site["reference/functions.md"] + site["reference/classes.md"]
    assert [
        named.path for named in public_names() if not re.search(rf"^##+ {named.path}$", reference, re.MULTILINE)
    ] == []


@pytest.mark.parametrize("words", SEARCHED)
def test_words_that_people_search_for_lead_to_an_answer(words, site):
    assert words.lower() in (site["faq.md"] + site["glossary.md"]).lower()


def test_messages_name_anchors_that_the_faq_has(site):
    named = {
        anchor
        for path in (ROOT / "src").rglob("*.py")
        for anchor in re.findall(r"docs/faq\.md#([\w-]+)", path.read_text())
    }
    anchors = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", site["faq.md"], re.MULTILINE)
    }
    assert named <= anchors


def test_a_page_that_no_navigation_lists_is_found(site):
    assert rules.unlisted({**site, "stray.md": "# Stray\n"}) == ["stray.md: website/zensical.toml lists it 0 times"]
    missing = {name: text for name, text in site.items() if name != "live.md"}
    assert rules.unlisted(missing) == ["live.md: is in website/zensical.toml, and there is no such page"]


def test_pages_of_a_folder_come_in_the_order_of_its_index():
    texts = {
        "tutorials/b.md": "# B\n",
        "tutorials/index.md": "# Tutorials\n\n[C](c.md) and [B](b.ipynb#top)\n",
        "tutorials/a.md": "# A\n",
        "tutorials/c.md": "# C\n",
    }
    section = dict(navigation.sections(navigation.navigation([*texts], texts.__getitem__)))["Tutorials"]
    assert section == [f"tutorials/{name}.md" for name in ("index", "c", "b", "a")]


@pytest.mark.parametrize(
    "block",
    ["```rust\nfn main() {}\n```", "```toml\na = \n```", "```json\n{a}\n```", "```sh\nfrobnicate --now\n```",
     "```sh\nmake nothing-of-that-name\n```", "```console\n$ python benchmarks/none.py\n```"],
)  # fmt: skip
def test_a_block_that_no_test_knows_is_found(block):
    assert len(rules.unknown_blocks(f"# A page\n\n{block}\n")) == 1


def test_blocks_that_tests_know_are_not_found():
    text = "```sh\nX=1 make test PYTHON=python3.12  # words\nfor a in b; do\n    dlrm train \\\n        x\ndone\n```\n"
    assert rules.unknown_blocks(f"{text}```\noutput\n```\n```toml\na = 1\n```\n") == []


def test_dead_links_and_what_is_fetched_from_elsewhere_are_found(tmp_path):
    (tmp_path / "index.html").write_text(
        '<h1 id="top"></h1><a href="b/#here">b</a> <a href="b/#gone">b</a> <a href="c/">c</a> <a href="#top">top</a>'
        '<a href="https://example.org">elsewhere</a> <script src="https://example.org/x.js"></script>'
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text('<h2 id="here"></h2><img src="../picture.svg">')
    assert built_wrong(tmp_path) == [
        ".: fetches https://example.org/x.js",
        ".: b/#gone leads nowhere",
        ".: c/ leads nowhere",
    ]


def test_no_page_names_a_registrys_host():
    host = re.compile(r"py(pi\.|thonhosted)|np(mj)s|un(pk)g|goo(gle)apis", re.IGNORECASE)
    named = [
        path.name
        for path in [*DOCS.rglob("*.md"), *(ROOT / "website").iterdir()]
        if path.is_file() and host.search(path.read_text())
    ]
    assert named == []


def test_the_built_site_is_ignored_by_git():
    assert SITE.is_relative_to(ROOT / "build")
    assert "/build/" in (ROOT / ".gitignore").read_text()


def test_a_notebook_is_a_page_of_words_code_and_what_was_printed(tmp_path, monkeypatch):
    def stream(name, text):
        return nbformat.v4.new_output("stream", name=name, text=text)

    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# Title"),
            nbformat.v4.new_code_cell(
                "%%bash\ndlrm doctor", outputs=[stream("stderr", "a, "), stream("stdout", "b\n")]
            ),
            nbformat.v4.new_code_cell(
                "x",
                outputs=[
                    nbformat.v4.new_output("execute_result", data={"text/html": "<b>1</b>\n\n", "text/plain": "1"})
                ],
            ),
        ]
    )
    monkeypatch.setattr("website.notebooks.DOCS", tmp_path)
    nbformat.write(notebook, tmp_path / "a.ipynb")
    page = notebook_page(tmp_path / "a.ipynb")
    assert page.startswith("# Title\n")
    assert "\n```sh\ndlrm doctor\n```\n\n```text\na, b\n```\n" in page
    assert '\n```python\nx\n```\n\n<div class="output"><b>1</b>\n</div>\n' in page
    assert 'href="a.ipynb"' in page


def test_documented_sql_runs(tmp_path, monkeypatch, site):
    """On the folders that the pages speak of."""
    statements = [block for text in site.values() for language, block in rules.blocks(text) if language == "sql"]
    assert statements
    monkeypatch.chdir(tmp_path)
    (tmp_path / "predictions").mkdir()
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    with duckdb.connect() as database:
        database.execute(
            "create table log as select 'a' as request_id, unnest([0, 1]) as request_row, ? as time", [now]
        )
        database.execute("copy log to 'predictions/0.parquet'")
        database.execute("copy (select 'a' as request_id, 1 as request_row, 1 as clicked) to 'clicks.parquet'")
        for statement in statements:
            database.execute(statement)
        labels = database.execute("select request_row, label from 'labelled.parquet' order by 1").fetchall()
    assert labels == [(0, 0), (1, 1)]
