"""What holds of the pages before any of them is built; a test of the suite asks the same.

Each page is listed once, each public name is documented, and each block of code is one that a test knows.
"""

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from website.navigation import listed, navigation
from website.notebooks import notebooks
from website.python import undocumented

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
# Programs that blocks of shell call. tests/unit/test_documentation.py parses what is called of `dlrm`; here is tried
# whether make's targets and the files that are named are there.
_PROGRAMS = {
    "cat", "cd", "cp", "curl", "docker", "dlrm", "export", "git", "kill", "kubectl", "ln", "ls", "make", "mkdir", "pip",
    "python", "python3", "rsync", "source", "ssh", "tensorboard", "uv", "zcat",
}  # fmt: skip
_SHELL_WORDS = {"for", "do", "done", "while", "if", "then", "fi"}


def problems(texts: dict[str, str]) -> list[str]:
    """Everything that is wrong, a line each, of all pages of the site by their paths."""
    wrong = [f"{name}: is public and has no docstring that says what it is" for name in undocumented()]
    wrong += unlisted(texts)
    # Of the code itself, which the tests run, and of notebooks, which are executed.
    made = ("reference/", "examples/", "files/", *(f"tutorials/{path.stem}.md" for path in notebooks()))
    for name, text in texts.items():
        wrong += [] if name.startswith(made) else [f"{name}: {line}" for line in unknown_blocks(text)]
    return wrong


def unlisted(texts: dict[str, str]) -> list[str]:
    """Pages that website/zensical.toml lists not at all or twice, and what it lists though there is no such page."""
    count = Counter(listed(navigation([*texts], texts.__getitem__)))
    wrong = [f"{name}: website/zensical.toml lists it {count[name]} times" for name in texts if count[name] != 1]
    return wrong + [
        f"{name}: is in website/zensical.toml, and there is no such page" for name in count if name not in texts
    ]


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The language and the text of each fenced block."""
    for indent, _, language, block in _BLOCK.findall(text):
        yield language.split()[0] if language.strip() else "", re.sub(rf"^{indent}", "", block, flags=re.MULTILINE)


def unknown_blocks(text: str) -> list[str]:
    """Blocks of code of which no test would notice that they are wrong.

    Python runs in tests/integration/test_documented_code.py, SQL in tests/unit/test_website.py, and `dlrm` is parsed in
    tests/unit/test_documentation.py; TOML, JSON and other lines of shell are read here. `text`, `html` and
    blocks without a language are output.
    """
    wrong = []
    for language, block in blocks(text):
        try:
            if language in {"sh", "console"}:
                wrong += [f"no test knows the line {line!r}" for line in _unknown_lines(block)]
            elif language == "toml":
                tomllib.loads(block)
            elif language == "json":
                json.loads(block)
            elif language not in {"", "text", "html", "python", "sql"}:
                wrong.append(f"no test runs a block of {language!r}")
        except ValueError as error:
            wrong.append(f"a block of {language} cannot be read: {error}")
    return wrong


def _unknown_lines(block: str) -> Iterator[str]:
    for line in block.replace("\\\n", " ").splitlines():
        words = line.partition(" #")[0].removeprefix("$ ").split()
        while words and (re.match(r"\w+=", words[0]) or words[0] in _SHELL_WORDS - {"for"}):
            words.pop(0)
        if not words or words[0].startswith("#") or words[0] == "for":
            continue
        program = words[0].rpartition("/")[2]
        targets = [word for word in words[1:] if re.fullmatch(r"[a-z][a-z-]*", word)] if program == "make" else []
        named = [
            word for word in words[1:] if re.match(r"(benchmarks|examples|deploy|docker|requirements)/[\w./-]+$", word)
        ]
        if (
            program not in _PROGRAMS
            or any(target not in _make_targets() for target in targets)
            or any(not (ROOT / name).exists() for name in named)
        ):
            yield line.strip()


def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
