"""The pages of the site as Markdown: those of docs/, and those that are made of the code.

In: docs/, the `dlrm` command, the public API, examples/.  Out: a text for each page, with links between pages alone.
"""

import ast
import json
import re
from collections.abc import Iterator
from functools import partial
from os.path import relpath
from pathlib import Path, PurePosixPath

from website.commands import commands_page
from website.notebooks import executed
from website.python import classes_page, functions_page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(?<!!)\]\(([^)\s]+)\)")
_NAMED_PAGE = re.compile(r"(?<![\w/(\[`])docs/([\w/-]+\.md)((?:#[\w-]+)?)")
_ESCAPE = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")  # colours of a terminal
_LANGUAGE = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".json": "json", ".sh": "sh"}


def pages() -> dict[str, str]:
    """The text of each page of the site by its path, such as `lab/dcn.md`."""
    texts = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
    texts |= {
        path.relative_to(DOCS).with_suffix(".md").as_posix(): notebook_page(path)
        for path in sorted(DOCS.rglob("*.ipynb"))
    }
    for folder, title, words in (
        ("decisions", "Decisions", "Why it is so: a page for each decision."),
        ("lab", "Lab notes", "How results came about, where the time goes, and what did not help."),
    ):
        texts.setdefault(f"{folder}/index.md", _index_page(folder, title, words, texts))
    texts |= {f"examples/{path.stem}.md": _example_page(path) for path in sorted((ROOT / "examples").glob("*.py"))}
    made = {
        "reference/commands.md": commands_page(),
        "reference/functions.md": functions_page(),
        "reference/classes.md": classes_page(),
    }
    texts |= {name: _link_named_pages(name, text) for name, text in made.items()}
    return _within_the_site(texts)


def title_of(text: str) -> str:
    """The first heading of a page."""
    return re.sub(r"[`*]", "", re.search(r"^# (.+)$", text, re.MULTILINE)[1])  # type: ignore[index]  # each page has one


def first_words(text: str) -> str:
    """The first sentence of a page below its heading, without links."""
    body = re.sub(r"<!--.*?-->|^# .*?$|^```.*?^```|^    .*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n", body)
    words = next((" ".join(part.split()) for part in paragraphs if re.match(r"\s*[\w\[*`(]", part)), "")
    words = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", words)
    return re.split(r"(?<=[.:!?])\s(?=[A-Z`*])", words)[0].rstrip(":")


def notebook_page(path: Path) -> str:
    """A notebook as a page: its texts, its code, and what the code has printed where the notebook was executed."""
    done = executed(path)
    cells = json.loads(path.read_text())["cells"] if done is None else done.cells
    parts = [part for cell in cells for part in _cell(cell)]
    if done is not None:
        about = done.metadata
        loading = " and the time to load PyTorch" if about.get("is_warm") else ""
        parts.append(f"*All of this was executed in {about.seconds:.0f} seconds{loading}, on {about.processor}.*")
    title, _, rest = parts[0].partition("\n\n")
    link = f'<a href="{path.name}" download>This page as a notebook</a>, to execute and to change.'
    parts[0] = "\n\n".join(part for part in (title, link, rest) if part)
    return "\n\n".join(parts) + "\n"


def _cell(cell: dict[str, object]) -> Iterator[str]:
    text = _joined(cell["source"])
    if cell["cell_type"] != "code":
        yield text
        return
    shell = text.removeprefix("%%bash\n")
    yield f"```{'python' if shell == text else 'sh'}\n{shell}\n```"
    printed = ""  # what a program prints comes in pieces, of both of its streams
    for output in [*cell.get("outputs", []), {}]:  # type: ignore[misc]  # nbformat: a list of objects
        if "text" in output:
            printed += _joined(output["text"])
            continue
        if shown := _ESCAPE.sub("", printed).rstrip():
            yield f"```text\n{shown}\n```"
        data, printed = output.get("data", {}), ""
        if "text/html" in data and "<script" not in _joined(data["text/html"]):
            html = re.sub(r"\n\s*\n", "\n", _joined(data["text/html"]))  # a blank line would end it for Markdown
            yield f'<div class="output">{html}</div>'
        elif shown := _ESCAPE.sub("", _joined(data.get("text/plain", ""))).rstrip():
            yield f"```text\n{shown}\n```"


def _joined(lines: object) -> str:
    return lines if isinstance(lines, str) else "".join(lines)  # type: ignore[arg-type]  # nbformat has both


def _index_page(folder: str, title: str, words: str, texts: dict[str, str]) -> str:
    rows = [
        f"- [{title_of(text)}]({PurePosixPath(name).name}): {first_words(text)}"
        for name, text in texts.items()
        if name.startswith(f"{folder}/")
    ]
    return "\n".join([f"# {title}", "", words, "", *rows, ""])


def _example_page(path: Path) -> str:
    code = path.read_text()
    module = ast.parse(code)
    about = ast.get_docstring(module) or ""
    first, _, rest = about.partition("\n")
    after = module.body[0].end_lineno or 0
    body = "\n".join(code.splitlines()[after:]).strip()
    title = first.rstrip(".")
    return f"# {title}\n\n`examples/{path.name}`\n\n{rest.strip(chr(10))}\n\n```python\n{body}\n```\n"


def _file_page(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    fence = "````" if "```" in path.read_text() else "```"
    language = _LANGUAGE.get(path.suffix, "text")
    return f"# {name}\n\nA file of the repository.\n\n{fence}{language}\n{path.read_text().strip()}\n{fence}\n"


def _link_named_pages(page: str, text: str) -> str:
    """Docstrings name pages as `docs/live.md#rollback`; in a page that is a link."""

    def linked(match: re.Match[str]) -> str:
        if not (DOCS / match[1]).exists():
            return match[0]
        return f"[{match[1]}]({relpath(match[1], PurePosixPath(page).parent)}{match[2]})"

    return _NAMED_PAGE.sub(linked, text)


def _within_the_site(texts: dict[str, str]) -> dict[str, str]:
    """Give a page to each file outside of docs/ that a page links, and lead its links there."""
    more: dict[str, str] = {}

    def led(page: str, match: re.Match[str]) -> str:
        link, mark, anchor = match[1].partition("#")
        if re.match(r"\w+:", link) or not link:
            return match[0]
        target = (DOCS / PurePosixPath(page).parent / link).resolve()
        if target.suffix == ".ipynb":
            return f"]({link.removesuffix('.ipynb')}.md{mark}{anchor})"
        if target.is_relative_to(DOCS) or not target.is_relative_to(ROOT) or not target.is_file():
            return match[0]  # where there is nothing, Zensical says so
        name = target.relative_to(ROOT)
        path = name.as_posix().removesuffix(".md")
        home = f"examples/{name.stem}.md" if name.parts[0] == "examples" else f"files/{path}.md"
        if home not in texts:
            more[home] = _file_page(target)
        return f"]({relpath(home, PurePosixPath(page).parent)}{mark}{anchor})"

    led_texts = {page: _LINK.sub(partial(led, page), text) for page, text in texts.items()}
    return led_texts | more
