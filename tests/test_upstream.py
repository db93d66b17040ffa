"""docs/upstream.md names every private interface of torch, TorchRec, FBGEMM and the server's libraries that we use."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "torchdlrm"
LISTED = (ROOT / "docs" / "upstream.md").read_text()


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def names_of_our_own(trees):
    """Every private name that our modules define: methods, attributes, functions, constants."""
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                is_of_self = isinstance(node, ast.Name) or (
                    isinstance(node.value, ast.Name) and node.value.id == "self"
                )
                if is_of_self:
                    yield node.id if isinstance(node, ast.Name) else node.attr


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def private_uses(tree, ours):
    """Private names of others that a module imports, reads, or reaches for by `getattr`; and operators of torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.module.startswith("torchdlrm"):
            if any(map(is_private, node.module.split("."))):
                yield node.module
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Attribute):
            name = dotted(node)
            if re.fullmatch(r"torch\.ops\.\w+\.\w+", name):
                yield name.removeprefix("torch.ops.")
            elif is_private(node.attr) and node.attr not in ours and name != "os._exit":  # documented by Python
                yield node.attr
        elif isinstance(node, ast.Call) and dotted(node.func) in {"getattr", "hasattr", "setattr"}:
            text = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if is_private(text) and text not in ours:
                yield text


def test_a_private_interface_is_listed_with_its_file():
    trees = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
    ours = frozenset(name for name in names_of_our_own(trees.values()) if is_private(name))
    uses = sorted({(file, name) for file, tree in trees.items() for name in private_uses(tree, ours)})
    rows = [row for row in LISTED.splitlines() if row.startswith("|")]

    def is_listed(file, name):
        return any(f"`{name}`" in row and f"`{file}`" in row for row in rows)

    assert uses
    assert [f"{file} uses {name}" for file, name in uses if not is_listed(file, name)] == [], "not in docs/upstream.md"


def test_what_is_listed_is_used():
    listed = {file for row in LISTED.splitlines() if row.startswith("|") for file in re.findall(r"`([\w/]+\.py)`", row)}
    missing = {file for file in listed if not (SOURCE / file).is_file() and not (ROOT / "tests" / file).is_file()}
    assert not missing
