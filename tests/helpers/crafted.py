"""Bundles that somebody has made to do harm, their checksums right; run as a program it opens some of them.

    python crafted.py open FOLDER...               what came of each, a line each
    python crafted.py fuzz BUNDLE FOLDER SEED N    N random changes of a bundle, each in FOLDER

It is a process of its own, since what it opens may crash it: what came of all before has been written by then.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path

BLOCK_BYTES = 16 * 2**20
MAX_BYTES, MAX_S = 8 << 30, 20
ODD = [None, True, -1, 0, 1, 3, 2**31, 2**62, 2**64, -(2**63), 0.5, 1e308, "", "x", "../x", "é" * 500, [], {}]


def copy(bundle, folder):
    """The files of a bundle under names of their own, as links: `write` makes one that may be changed."""
    shutil.copytree(bundle, folder, copy_function=os.link)
    return folder


def write(path, data):
    path.unlink()
    path.write_bytes(data)


def fifo(name):
    """A change: nothing is ever read from a file."""

    def craft(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return craft


def change_manifest(folder, change, name="bundle.json"):
    """Change what a manifest says, a value of JSON, and give it the checksum that it must have."""
    path = folder / name
    content = json.loads(path.read_text(encoding="utf-8"))
    changed = change(content)
    content = content if changed is None else changed
    if isinstance(content, dict) and isinstance(content.get("content_sha256"), str):
        text = json.dumps(content | {"content_sha256": ""}, ensure_ascii=False)
        content["content_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    write(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def seal(folder):
    """Give all files the checksums that they must have."""

    def sums(content):
        for name, record in content["files"].items():
            if (folder / name).is_file():
                data = (folder / name).read_bytes()
                record |= {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        data = (folder / "weights.safetensors").read_bytes()
        blocks = [data[start : start + BLOCK_BYTES] for start in range(0, len(data), BLOCK_BYTES)]
        content["block_sha256"] = [hashlib.sha256(block).hexdigest() for block in blocks]

    change_manifest(folder, sums)


def change_header(folder, change):
    """Change the header of the weights, a dictionary, and leave the numbers."""
    path = folder / "weights.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    write(path, len(text).to_bytes(8, "little") + text + data[end:])
    seal(folder)


def outcome(folder):
    """What opening and predicting comes to: `ok`, or the exception's class and what it says."""
    from torchdlrm.prediction.predictor import Predictor

    signal.alarm(MAX_S)
    try:
        predictor = Predictor.open(folder, num_threads=1)
        predictor.check_sample()
        predictor.predict(predictor.parse_rows([{}] * 3))
    except BaseException as error:  # noqa: BLE001 - Polars' panics are no `Exception`
        if type(error).__name__ not in {"BundleError", "RowError"}:
            traceback.print_exc()
        return f"{type(error).__name__}: {str(error)[:300]!r}"
    finally:
        signal.alarm(0)
    return "ok"


def tell(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def places(value, path=()):
    """The path of every value within a value of JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def change_at_random(rng, content):
    """Replace, remove or double a value somewhere within one of JSON."""
    *parents, key = rng.choice([path for path in places(content) if path])
    for parent in parents:
        content = content[parent]
    kind = rng.random()
    if kind < 0.15:
        del content[key]
    elif kind < 0.3 and isinstance(content, dict):
        content[str(key) + "2"] = content[key]
    elif kind < 0.5 and isinstance(content[key], int | float):
        content[key] += rng.choice([-1, 1, 128, -(10**9), 2**31])
    else:
        content[key] = rng.choice(ODD)


def flip_at_random(rng, path):
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 4])):
        edge = rng.choice([len(data), min(len(data), 1024)])  # what says how the rest is read stands at both ends
        place = rng.randrange(edge) if rng.random() < 0.5 else len(data) - 1 - rng.randrange(edge)
        data[place] = rng.choice([0, 255, data[place] ^ 1 << rng.randrange(8), rng.randrange(256)])
    write(path, bytes(data))


def fuzz(bundle, folder, seed, number):
    for case in range(number):
        rng = random.Random(f"{seed}-{case}")
        shutil.rmtree(folder, ignore_errors=True)
        copy(bundle, folder)
        kind = rng.choice(["manifest", "manifest", "header", "index", "index", "sample"])
        tell(f"{case} {kind} ")
        if kind == "manifest":
            change_manifest(folder, lambda content, rng=rng: change_at_random(rng, content))
        elif kind == "header":
            change_header(folder, lambda header, rng=rng: change_at_random(rng, header))
        else:
            suffix = {"index": "*.index", "sample": "sample.parquet"}[kind]
            flip_at_random(rng, rng.choice(sorted(folder.rglob(suffix))))
            seal(folder)
        tell(f"{outcome(folder)}\n")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    if sys.argv[1] == "open":
        for name in sys.argv[2:]:
            tell(f"{Path(name).name} {outcome(Path(name))}\n")
    else:
        fuzz(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
