"""Data flows one way: a module imports only from lower floors, never sideways between the rooms of one floor."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import torchdlrm

ROOT = Path(__file__).parents[1] / "src" / "torchdlrm"
FLOORS = {
    "driverless": 0,
    "errors": 0,
    "files": 0,
    "folders": 0,
    "html": 0,
    "judged": 0,
    "metrics": 0,
    "notebook": 0,
    "processor": 0,
    "progress": 0,
    "ranks": 0,
    "records": 0,
    "shared_memory": 0,
    "storage": 0,
    "toml": 0,
    "units": 0,
    "versions": 0,
    "config": 1,
    "jobs": 1,
    "judging": 1,
    "features": 2,
    "kernels": 3,
    "logs": 3,
    "data": 4,
    "synthetic": 4,
    "loader": 5,
    "model": 5,
    "preprocessing": 5,
    "bundle": 6,
    "sharding": 6,
    "tables": 6,
    "prediction": 7,
    "training": 7,
    "evaluation": 8,
    "exporting": 8,
    "planning": 8,
    "bench": 9,
    "doctor": 9,
    "insight": 9,
    "live": 9,
    "serving": 9,
    "sweeping": 9,
    "quickstart": 10,
    "cli": 11,
}
# The ground's modules may import each other, as long as there is no circle.
GROUND = {room for room, floor in FLOORS.items() if floor == 0}
NO_TORCH = GROUND | {"config", "features", "jobs", "judging", "logs", "data", "synthetic", "preprocessing"}
ENGINE = {"torch", "torchrec", "fbgemm_gpu"}
# What predicts must not need what trains: a server starts without it.
NO_TRAINING = {"bundle", "prediction", "serving"}
TRAINS = {"torchdlrm.training", "torchdlrm.sharding", "torchdlrm.tables", "torchdlrm.loader", "torchrec"}


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
    return [path for path in ROOT.rglob("*.py") if path not in {ROOT / "__init__.py", ROOT / "__main__.py"}]


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


def forbidden(rooms, roots):
    """Imports in these rooms of modules under these roots."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules()
        if room_of(path) in rooms
        for name in imports_of(path)
        if any(name == root or name.startswith(f"{root}.") for root in roots)
    ]


def test_the_disk_side_knows_no_torch():
    assert forbidden(NO_TORCH, ENGINE) == []


def test_what_predicts_knows_no_training():
    assert forbidden(NO_TRAINING, TRAINS) == []


def test_the_service_knows_neither_its_front_nor_its_page():
    above = [f"torchdlrm.serving.{name}" for name in ("front", "page", "server", "supervisor", "worker")]
    found = {
        part: [name for path in (ROOT / "serving" / part).rglob("*.py") for name in imports_of(path)]
        for part in ("service", "page")
    }
    assert [name for name in found["service"] if name.startswith(tuple(above))] == []
    assert [name for name in found["page"] if name.startswith("torchdlrm.")] == []


def test_no_public_name_is_that_of_a_room():
    """Importing a room binds it as an attribute of the package: a function of its name would become a module."""
    assert not set(torchdlrm.__all__) & set(FLOORS)


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


def test_unit_tests_start_no_processes():
    """They are what one runs while working: seconds, not minutes."""
    folder = Path(__file__).parent / "unit"
    starts = re.compile(r"subprocess\.|\bPopen\(|\bdlrm\(|def test_\w+\(.*\b(serve|browser)\b")
    assert [path.name for path in folder.rglob("*.py") if starts.search(path.read_text())] == []


def test_the_document_has_the_floors():
    document = (ROOT.parents[1] / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", document, re.MULTILINE)
    told = {name: int(floor) for floor, names in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", names)}
    assert told == FLOORS
