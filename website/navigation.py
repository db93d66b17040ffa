"""Which pages the site has and in what order: website/zensical.toml, with its patterns filled in.

In: names of pages, as paths below docs/.  Out: the navigation as Zensical reads it, and which pages are in none.
"""

import re
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

SETTINGS = Path(__file__).with_name("zensical.toml")
LINK = re.compile(r"\]\(([^)\s#]+\.(?:md|ipynb))[#)]")


def settings() -> dict[str, Any]:
    """Everything that website/zensical.toml says, without its table's name."""
    project: dict[str, Any] = tomllib.loads(SETTINGS.read_text())["project"]
    return project


def navigation(pages: list[str], read: Callable[[str], str]) -> list[Any]:
    """The navigation, in which each pattern has become the pages that it matches.

    Args:
        pages: all there are, as `lab/dcn.md`.
        read: gives the text of a page.
    """
    return [entry for item in settings()["nav"] for entry in _filled(item, pages, read)]


def listed(entries: list[Any]) -> Iterator[str]:
    """Every page that a navigation names."""
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for pages in entry.values():
                yield from listed(pages if isinstance(pages, list) else [pages])


def sections(entries: list[Any]) -> Iterator[tuple[str, list[str]]]:
    """The title of each entry of a navigation, and the pages below it."""
    for entry in entries:
        for title, pages in entry.items():
            yield title, list(listed(pages if isinstance(pages, list) else [pages]))


def _filled(item: Any, pages: list[str], read: Callable[[str], str]) -> list[Any]:
    if isinstance(item, str):
        return _matched(item, pages, read) if "*" in item else [item]
    ((title, below),) = item.items()
    if isinstance(below, str) and "*" not in below:
        return [item]
    filled = [entry for part in ([below] if isinstance(below, str) else below) for entry in _filled(part, pages, read)]
    return [{title: filled[0] if len(filled) == 1 else filled}] if filled else []


def _matched(pattern: str, pages: list[str], read: Callable[[str], str]) -> list[str]:
    found = sorted(page for page in pages if fnmatch(page, pattern))
    index = next((page for page in found if PurePosixPath(page).name == "index.md"), None)
    if index is None:
        return found
    folder = PurePosixPath(index).parent
    links = [(folder / link).with_suffix(".md").as_posix() for link in LINK.findall(read(index))]
    order = {page: place for place, page in reversed([*enumerate([index, *links])])}
    return sorted(found, key=lambda page: (order.get(page, len(order)), page))
