"""Installs torchdlrm in every way that docs/installation.md has, each from nothing, and tries what it brings.

    install.py [uv] [lock] [wheel] [serve] [--python PYTHON]

In: a clean checkout.  Out: a table of seconds and gigabytes.  Each way fetches gigabytes and takes minutes, so no test
of `make test` does it. Caches of uv and pip stay unused.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
NO_CACHES = {"PIP_NO_CACHE_DIR": "1", "UV_NO_CACHE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
Command = list[str]


def by_uv(clone: Path, python: str, _wheel: Path) -> Iterator[Command]:
    """From a clone, with uv."""
    yield ["uv", "sync", "--quiet", "--python", python, "--extra", "cpu", "--project", str(clone)]


def by_lock(clone: Path, python: str, _wheel: Path) -> Iterator[Command]:
    """The exact versions of the lock file, with pip."""
    yield [python, "-m", "venv", str(clone / ".venv")]
    pip = [str(clone / ".venv/bin/pip"), "install", "--quiet", "--no-deps"]
    yield [*pip, "--requirement", str(clone / "requirements/cpu.lock")]
    yield [*pip, str(clone)]


def by_wheel(clone: Path, python: str, wheel: Path) -> Iterator[Command]:
    """The wheel with all that trains, with pip."""
    yield [python, "-m", "venv", str(clone / ".venv")]
    pip = [str(clone / ".venv/bin/pip"), "install", "--quiet"]
    yield [*pip, f"{wheel}[cpu]"]
    yield [*pip, "--no-deps", "--requirement", str(clone / "requirements/torchrec.txt")]


def by_serving_wheel(clone: Path, python: str, wheel: Path) -> Iterator[Command]:
    """The wheel without what only trains, with pip."""
    yield [python, "-m", "venv", str(clone / ".venv")]
    yield [str(clone / ".venv/bin/pip"), "install", "--quiet", f"{wheel}[serve]"]


WAYS: dict[str, Callable[[Path, str, Path], Iterator[Command]]] = {
    "uv": by_uv,
    "lock": by_lock,
    "wheel": by_wheel,
    "serve": by_serving_wheel,
}


def main() -> None:
    """Try the ways that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"one of {', '.join(WAYS)}; all if none is named")
    parser.add_argument("--python", default=sys.executable)
    asked = parser.parse_args()
    unknown = [way for way in asked.ways if way not in WAYS]
    if unknown:
        parser.error(f"{unknown[0]}: there is no such way; ways are {', '.join(WAYS)}")
    print("| way | versions | installing | on the disk | `dlrm doctor` | `dlrm quickstart` |\n" + "| --- " * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder), asked.python)
        for way in asked.ways or WAYS:
            print(try_way(way, Path(folder), asked.python, wheel), flush=True)


def build(folder: Path, python: str) -> Path:
    """The wheel of what is committed."""
    run("git", "clone", "--quiet", str(ROOT), str(folder / "source"))
    run(python, "-m", "venv", str(folder / "build"))
    run(str(folder / "build/bin/pip"), "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), folder / "source")
    return next(folder.glob("torchdlrm-*.whl"))


def try_way(way: str, folder: Path, python: str, wheel: Path) -> str:
    """Install in one way and try it; a row of the table."""
    with tempfile.TemporaryDirectory() as place:
        clone = Path(place) / "clone"
        run("git", "clone", "--quiet", str(ROOT), str(clone))
        installing_s = sum(run(*command) for command in WAYS[way](clone, python, wheel))
        megabytes = output("du", "-sm", clone / ".venv").split()[0]
        bin_folder = clone / ".venv/bin"
        code = "from importlib.metadata import version as v; print(v('torch'), v('fbgemm-gpu-cpu'), sep=' / ')"
        versions = output(bin_folder / "python", "-c", code).strip()
        dlrm = str(bin_folder / "dlrm")
        doctor_s = run(dlrm, "doctor")
        if way == "serve":
            run(dlrm, "synthesize", "--rows", "2000", "--out", f"{place}/log.tsv")
            run(dlrm, "preprocess", f"{place}/log.tsv", "--schema", "criteo", "--out", f"{place}/dataset")
            if (folder / "bundle").exists():  # of a way before
                run(dlrm, "predict", str(folder / "bundle"), f"{place}/log.tsv")
            quickstart = "does not train"
        else:
            quickstart = f"{run(dlrm, 'quickstart', '--out', f'{place}/quickstart'):.0f} s"
            run(dlrm, "export", f"{place}/quickstart/run", "--out", str(folder / f"bundle-of-{way}"))
            (folder / "bundle").unlink(missing_ok=True)
            (folder / "bundle").symlink_to(folder / f"bundle-of-{way}")
    size = f"{int(megabytes) / 1000:.1f} GB"
    return f"| {way} | {versions} | {installing_s:.0f} s | {size} | {doctor_s:.0f} s | {quickstart} |"


def run(*command: str | Path) -> float:
    """The seconds that a command takes."""
    start_s = time.perf_counter()
    output(*command)
    return time.perf_counter() - start_s


def output(*command: str | Path) -> str:
    """What a command prints; ends this program with the command's errors where it fails."""
    environment = {**os.environ, **NO_CACHES}
    elsewhere = tempfile.gettempdir()
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=elsewhere, env=environment)  # noqa: S603
    if done.returncode:
        said = f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{said}")
    return done.stdout


if __name__ == "__main__":
    main()
