"""Makes a release: the version where it stands, the wheel, and a trial of the wheel in an empty environment.

In: a clean checkout and the version.  Out: `dist/`, and changed files to commit.  It commits and uploads nothing.
"""

import datetime
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each file that holds the version, with the line that does: `{}` is the version's place.
PLACES = {
    "pyproject.toml": 'version = "{}"\n',
    "src/torchdlrm/__init__.py": '__version__ = "{}"\n',
    "CITATION.cff": "\nversion: {}\n",
    "deploy/kserve.yaml": "image: torchdlrm-serve:{}\n",
    "deploy/live.yaml": "image: torchdlrm:{}\n",
    "deploy/preprocess.yaml": "image: torchdlrm:{}\n",
    "deploy/serve.yaml": "image: torchdlrm-serve:{}\n",
    "deploy/train.yaml": "image: torchdlrm:{}\n",
}
VERSION = r"(\d+\.\d+\.\d+)"
# From a raw row to a prediction, with nothing but what the wheel brings.
TRIAL = """
dlrm doctor
dlrm synthesize --rows 20000 --out log.tsv
dlrm preprocess log.tsv --schema criteo --out dataset
dlrm train criteo-small --dataset dataset --run run
dlrm evaluate run --split test
dlrm export run --out bundle
dlrm predict bundle log.tsv --out scores.parquet
"""


def main() -> None:
    """`release.py VERSION`."""
    version = sys.argv[1] if len(sys.argv) == 2 else ""
    if not re.fullmatch(VERSION, version):
        sys.exit(f"{version!r} is no version; write for example: make release VERSION=0.3.0")
    if run("git", "status", "--porcelain").strip():
        sys.exit("the tree has changes that are not committed: commit them first")
    heading = f"## {version} (unreleased)\n"
    if heading not in (ROOT / "CHANGELOG.md").read_text():
        sys.exit(f"CHANGELOG.md has no heading {heading.strip()!r}: what does this version bring?")
    write_version(version, heading)
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(version, Path(folder))
        try_wheel(wheel, version, Path(folder))
    print(f"\n{wheel.relative_to(ROOT)} works. What is left:")
    print(f"  git commit --all --message 'Release {version}' && git tag v{version} && git push --follow-tags")
    print(f"  python -m twine upload dist/torchdlrm-{version}*")


def versions() -> dict[str, str]:
    """The version that each file holds."""
    return {name: pattern(name).search((ROOT / name).read_text())[1] for name in PLACES}


def pattern(name: str) -> re.Pattern[str]:
    """What finds the version in a file."""
    return re.compile(re.escape(PLACES[name]).replace(r"\{\}", VERSION))


def write_version(version: str, heading: str) -> None:
    """Put the version into each of its places, and today's date into the changelog's heading of it."""
    for name, line in PLACES.items():
        text = (ROOT / name).read_text()
        (ROOT / name).write_text(pattern(name).sub(line.format(version), text))
    today = datetime.datetime.now(datetime.UTC).date()
    changelog = ROOT / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace(heading, f"## {version} ({today})\n"))


def build(version: str, folder: Path) -> Path:
    """The wheel, made of the source archive, so that the archive is whole; both in `dist/`."""
    python = environment(folder / "build")
    run(python, "-m", "pip", "install", "--quiet", "build")
    run(python, "-m", "build", "--outdir", str(ROOT / "dist"), str(ROOT))
    return ROOT / "dist" / f"torchdlrm-{version}-py3-none-any.whl"


def try_wheel(wheel: Path, version: str, folder: Path) -> None:
    """Install the wheel into an empty environment as a user does, and go from a log to predictions there."""
    python = environment(folder / "trial")
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[cpu]")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", "requirements/torchrec.txt")
    work = folder / "work"
    work.mkdir()
    dlrm = Path(python).with_name("dlrm")
    assert run(str(dlrm), "-V").strip() == version, "the wheel has another version"
    for line in TRIAL.split("\n")[1:-1]:
        print(line, flush=True)
        run(str(dlrm), *line.split()[1:], cwd=work)


def environment(folder: Path) -> str:
    """The Python of a new, empty virtual environment."""
    venv.create(folder, with_pip=True)
    return str(folder / "bin/python")


def run(*command: str, cwd: Path = ROOT) -> str:
    """What a command prints; ends this program with the command's errors where it fails."""
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
