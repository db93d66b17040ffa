"""Data flows one way: a module imports only from lower floors, never sideways between the rooms of one floor."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "torchdlrm"
FLOORS = {
    "errors": 0,
    "schema": 0,
    "progress": 0,
    "metrics": 0,
    "units": 0,
    "toml": 0,
    "config": 1,
    "data": 2,
    "loader": 3,
    "model": 3,
    "sharding": 4,
    "training": 5,
    "evaluation": 6,
    "export": 6,
    "predict": 7,
    "serve": 8,
    "bench": 8,
    "cli": 9,
}
NO_TORCH = {"errors", "schema", "progress", "metrics", "units", "toml", "config", "data"}
# The root exception's floor: these may import each other, as long as there is no circle.
GROUND = {"errors", "schema", "progress", "metrics", "units", "toml"}


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path):
    """Absolute names of all modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module


def modules():
    return [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


def test_every_room_has_a_floor():
    assert {room_of(path) for path in modules()} <= set(FLOORS)


def test_modules_import_only_from_lower_floors():
    upward = []
    for path in modules():
        room = room_of(path)
        for name in imports_of(path):
            if not name.startswith("torchdlrm."):
                continue
            other = name.split(".")[1]
            if other != room and FLOORS[other] >= FLOORS[room] and not {room, other} <= GROUND:
                upward.append(f"{path.relative_to(ROOT)} imports {name}")
    assert upward == []


def test_the_disk_side_knows_no_torch():
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules()
        if room_of(path) in NO_TORCH
        for name in imports_of(path)
        if name.split(".")[0] in {"torch", "torchrec", "fbgemm_gpu"}
    ]
    assert found == []


def code_lines(path):
    """Lines that are neither blank nor part of a docstring: a verb's options are told in its docstring."""
    text = path.read_text()
    told = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            told |= set(range(node.lineno, node.end_lineno + 1))
    return [line for number, line in enumerate(text.splitlines(), 1) if line.strip() and number not in told]


def test_verbs_are_short():
    lengths = {path.name: len(code_lines(path)) for path in (ROOT / "cli").glob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 100} == {}


def test_whatever_is_imported_is_declared():
    """A dependency's own dependency may be another one's tomorrow."""
    named_otherwise = {"google": "protobuf", "grpc": "grpcio", "mlflow": "mlflow-skinny"}
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())["project"]
    lists = [
        project["dependencies"],
        *(lines for name, lines in project["optional-dependencies"].items() if name != "dev"),
    ]
    declared = {re.split(r"[^\w-]", line)[0] for lines in lists for line in lines}
    imported = {name.partition(".")[0] for path in modules() for name in imports_of(path)}
    imported -= {"torchdlrm", *sys.stdlib_module_names}
    missing = {name for name in imported if named_otherwise.get(name, name.replace("_", "-")) not in declared}
    assert not missing
