"""How soon a bundle with large tables answers under `--verify lazy`, and how much memory the answers make resident.

    dlrm export run --out bundle
    python benchmarks/lazy_bundle.py bundle --gigabytes 10

The tables of a float32 bundle are made larger by random rows behind their own, in a folder that is removed at the end.
Then, in a process of its own: open it, predict a row, a hundred, two thousand, all of ids that are uniform over the
tables, which real ids are not. Memory is what the process has beyond what it had before opening; pages of the file
belong to the page cache, and all processes that serve the bundle share them. And `dlrm serve`, lazy and full: when it
says that it is ready, and all of its memory after the first answer.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from shutil import copy, copytree
from urllib import request

import numpy as np
import torch
from torch import Tensor

from torchdlrm.bundle import TablePrecision
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.manifest import MANIFEST_NAME, SAMPLE_NAME, WEIGHTS_NAME, BundleManifest
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.bundle.write import write_weights
from torchdlrm.model import table_weight
from torchdlrm.progress import SILENT

NUM_ROWS = (1, 100, 2000)


class Grown:
    """The weights of a bundle, with random rows behind those of its tables."""

    def __init__(self, bundle: Bundle, num_rows: Mapping[str, int]) -> None:
        self._bundle = bundle
        dim = bundle.manifest.model.embedding_dim
        tables = {table_weight(name): (rows, dim) for name, rows in num_rows.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {**bundle.weights.shapes, **tables}
        self.shapes = {name: shape for name, shape in self.shapes.items() if name != "padding"}

    def tensor(self, name: str) -> Tensor:
        """A layer, as it is."""
        return self._bundle.weights.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The table's own rows, then random ones."""
        own = self._bundle.weights.tensor(name)[start:stop]
        return torch.cat([own, torch.empty(stop - start - len(own), own.shape[1]).uniform_(-0.01, 0.01)])


def grow(source: Path, folder: Path, num_rows: Mapping[str, int]) -> Path:
    """Write the bundle with larger tables, of `num_rows` of each feature; its first rows predict what they did."""
    bundle = Bundle.open(source)
    manifest = bundle.manifest
    for name, record in manifest.sparse.items():
        if record.precision != "float32" or record.num_embeddings > num_rows[name]:
            sys.exit(f"{source}: the table of {name} is not of float32, or has more rows than {num_rows[name]:,}")
    path = folder / "bundle"
    path.mkdir()
    copy(source / SAMPLE_NAME, path)
    copytree(source / "vocabulary", path / "vocabulary")
    precisions: dict[str, TablePrecision] = dict.fromkeys(manifest.sparse, "float32")
    stored, block_sha256 = write_weights(Grown(bundle, num_rows), precisions, path / WEIGHTS_NAME, SILENT)
    larger = {
        name: record.model_copy(update={"num_embeddings": num_rows[name]}) for name, record in manifest.sparse.items()
    }
    files = {**manifest.files, WEIGHTS_NAME: stored}
    manifest = manifest.model_copy(
        update={"sparse": larger, "files": files, "block_sha256": block_sha256},
    )
    (path / MANIFEST_NAME).write_text(manifest.sealed().to_json(), encoding="utf-8")
    return path


def resident_mb(process: int | str = "self") -> tuple[float, float]:
    """Anonymous memory and pages of files."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    sizes = {line.split()[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return sizes["RssAnon:"] / 1e3, sizes["RssFile:"] / 1e3


def measure_server(path: Path, verify: str) -> dict[str, float | str]:
    """From the start of `dlrm serve` to its first answer."""
    command = [str(Path(sys.executable).with_name("dlrm")), "serve", str(path), "--verify", verify, "--json"]
    begun_s = time.perf_counter()
    with subprocess.Popen(
        [*command, "--port", "0", "--log-level", "warning"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        ready_s = time.perf_counter() - begun_s
        request.urlopen(f"{url}/predict", b"[{}]", timeout=60).close()  # noqa: S310 - it is ours
        anonymous_mb, file_mb = resident_mb(server.pid)
        server.terminate()
    return {
        "what": f"dlrm serve, {verify}: ready",
        "after_s": ready_s,
        "touched_mb": 0.0,
        "anonymous_mb": anonymous_mb,
        "file_mb": file_mb,
    }


def measure(path: Path) -> list[dict[str, float | str]]:
    """In this process: what it takes to open the bundle and to predict ever more rows."""
    random = np.random.default_rng(0)
    torch.empty(1).sigmoid_()
    before_mb, begun_s = resident_mb(), time.perf_counter()
    results: list[dict[str, float | str]] = []

    def note(what: str, touched_mb: float) -> None:
        anonymous_mb, file_mb = (now - then for now, then in zip(resident_mb(), before_mb, strict=True))
        results.append(
            {
                "what": what,
                "after_s": time.perf_counter() - begun_s,
                "touched_mb": touched_mb,
                "anonymous_mb": anonymous_mb,
                "file_mb": file_mb,
            }
        )

    bundle = Bundle.open(path, verify="lazy")
    model = ServedModel(bundle)
    note("open", 0.0)
    table_rows = [record.num_embeddings for record in bundle.manifest.sparse.values()]
    pages = [np.empty(0, np.int64)]
    for num_rows in NUM_ROWS:
        ids_FB = np.array([random.integers(0, rows, num_rows) for rows in table_rows])
        model.predict(EncodedRows(np.zeros((num_rows, len(bundle.schema.dense)), np.float32), ids_FB))
        starts = np.array([bundle.weights.span(table_weight(name))[0] for name in bundle.manifest.sparse])
        row_bytes = 4 * bundle.manifest.model.embedding_dim
        pages.append(((starts[:, None] + ids_FB * row_bytes) // 4096).ravel())
        note(f"{num_rows:,} rows predicted", 4096 * len(np.unique(np.concatenate(pages))) / 1e6)
    bundle.verifier.wait()
    note("everything checked", float(results[-1]["touched_mb"]))
    return results


def main() -> None:
    """Grow, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="with float32 tables")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of tables")
    parser.add_argument("--folder", type=Path, default=Path(), help="where there is room for them")
    parser.add_argument("--json", type=Path, help="write the measurements here, too")
    parser.add_argument("--measure", action="store_true", help="the bundle is large already: measure, print JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.bundle)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        manifest = BundleManifest.read(options.bundle)
        row_bytes = 4 * manifest.model.embedding_dim
        num_rows = dict.fromkeys(manifest.sparse, int(options.gigabytes * 1e9 / row_bytes / len(manifest.sparse)))
        path = grow(options.bundle, Path(folder), num_rows)
        command = [sys.executable, __file__, str(path), "--measure"]
        results = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        results += [measure_server(path, verify) for verify in ("lazy", "full")]
    print(f"{'':26}{'after s':>10}{'touched MB':>12}{'anonymous MB':>14}{'of files MB':>13}")
    for row in results:
        figures = f"{row['after_s']:10.2f}{row['touched_mb']:12.1f}{row['anonymous_mb']:14.0f}{row['file_mb']:13.0f}"
        print(f"{row['what']:26}{figures}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
