"""Builds the site: `python -m website.build`, or `make site`. It fails where the site is not whole.

In: docs/, the code, Zensical.  Out: build/site/, a page as page/index.html and as page.md, and llms.txt.

A link that leads nowhere fails the build, and so do a page that the navigation does not list, a public name without a
docstring, a block of code that no test runs, and a page that would fetch something from another host.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from website.drawing import SCHEMES
from website.navigation import navigation, sections, settings
from website.pages import DOCS, ROOT, first_words, pages, title_of
from website.rules import problems

BUILD = ROOT / "build"
SITE = BUILD / "site"
_STAGED = BUILD / "pages"
_PICTURE = re.compile(r"^!\[([^\]]*)\]\(([^)\s]+\.svg)\)$", re.MULTILINE)


def main() -> None:
    """Build the site, and say where it is or what is wrong."""
    start = time.perf_counter()
    texts = pages()
    wrong = problems(texts)
    if not wrong:
        nav = navigation([*texts], texts.__getitem__)
        stage(texts)
        zensical(nav)
        publish_markdown(texts, nav)
        wrong = built_wrong(SITE)
    if wrong:
        sys.stderr.write("".join(f"{line}\n" for line in wrong) + f"{len(wrong)} problems: the site is not whole\n")
        sys.exit(1)
    where = SITE.relative_to(ROOT)
    sys.stdout.write(f"{len(texts)} pages in {where} in {time.perf_counter() - start:.1f} s; to read them: ")
    sys.stdout.write(f"python -m http.server --directory {where}\n")


def stage(texts: dict[str, str]) -> None:
    """Write what Zensical reads: pages whose pictures stand in them, where they have the colours of the page."""
    shutil.rmtree(_STAGED, ignore_errors=True)
    shutil.copytree(DOCS, _STAGED, ignore=shutil.ignore_patterns("*.md"))
    (_STAGED / "style.css").write_text(SCHEMES + Path(__file__).with_name("style.css").read_text())
    for name, text in texts.items():
        path = _STAGED / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_with_pictures(text, path.parent))


def zensical(nav: list[object]) -> None:
    """Run Zensical in strict mode; its warnings end the build."""
    config = {**settings(), "nav": nav, "docs_dir": _STAGED.name, "site_dir": SITE.name}
    shutil.rmtree(SITE, ignore_errors=True)
    path = BUILD / "mkdocs.yml"
    path.write_text(json.dumps(config, indent=1))  # JSON is YAML
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "--config-file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BUILD)  # noqa: S603
    if done.returncode:
        plain = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
        sys.stderr.write(plain.partition("Traceback")[0])
        sys.exit(1)


def publish_markdown(texts: dict[str, str], nav: list[object]) -> None:
    """Write each page as Markdown next to its folder, and llms.txt: what pages there are, and what each says."""
    for name, text in texts.items():
        path = SITE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(re.sub(r"<!--.*?-->\n*", "", text, flags=re.DOTALL))
    lines = ["# torchdlrm", "", f"> {settings()['site_description']}", ""]
    for title, names in sections(nav):
        rows = [f"- [{title_of(texts[name])}]({name}): {first_words(texts[name])}" for name in names]
        lines += [f"## {title}", "", *rows, ""]
    (SITE / "llms.txt").write_text("\n".join(lines))


def built_wrong(site: Path) -> list[str]:
    """What is wrong with the built pages: links that lead nowhere, and what is fetched from another host."""
    built = {path: _Page(path) for path in sorted(site.rglob("*.html"))}
    wrong = []
    for path, page in built.items():
        where = path.relative_to(site).parent.as_posix()
        wrong += [f"{where}: fetches {address}" for address in page.fetched if re.match(r"(\w+:)?//", address)]
        for link in page.links:
            target, _, anchor = unquote(link).partition("#")
            if re.match(r"\w+:|//", target) or path.name == "404.html":
                continue
            found = (path.parent / target).resolve() if target else path
            found = found / "index.html" if found.is_dir() else found
            if not found.exists() or (anchor and found in built and anchor not in built[found].anchors):
                wrong.append(f"{where}: {link} leads nowhere")
    return wrong


class _Page(HTMLParser):
    """The links of a page, what it fetches, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of a tag."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        address = values.get("href", values.get("src"))
        if tag == "a" and address is not None:
            self.links.append(address)
        elif address and not address.startswith("data:") and values.get("rel") not in {"canonical", "next", "prev"}:
            self.fetched.append(address)


def _with_pictures(text: str, home: Path) -> str:
    return _PICTURE.sub(lambda match: _drawn(home / match[2], match[1]), text)


def _drawn(path: Path, words: str) -> str:
    """A picture as part of the page, in a box that scrolls where the screen is narrow."""
    picture = re.sub(r"\n\s*\n", "\n", path.read_text())
    if "<script" in picture or not picture.startswith("<svg"):
        msg = f"{path}: not a picture of ours"
        raise ValueError(msg)
    return f'<figure class="drawn" aria-label="{escape(words)}"><div tabindex="0">{picture}</div></figure>'


if __name__ == "__main__":
    main()
