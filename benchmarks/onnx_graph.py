"""Rows a CPU second of a bundle's ONNX graph in onnxruntime, next to the bundle's own, by turns; and their difference.

    python benchmarks/onnx_graph.py --out onnx.json

Both have one thread and predict the same encoded rows, random over the tables, in float32; seconds are those of the
processor, so that other programs on the machine count less. The bundles are random models of the paper's size and of
criteo-small's; the tables have 1.1 million rows together.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from torchdlrm import load_config, onnx_inputs
from torchdlrm.bench.random_bundle import write_random_bundle
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.precision import TABLE_PRECISIONS
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.config import ModelConfig
from torchdlrm.exporting.onnx_file import write_onnx
from torchdlrm.processor import processor_name

ROWS, BATCH_ROWS = 10_000, 1_000
MODELS = {"criteo-small": load_config("criteo-small").model, "paper": ModelConfig()}
SIZES = {f"cat_{i}": int(rows) for i, rows in enumerate(np.geomspace(3, 400_000, 26))}


def random_rows() -> EncodedRows:
    """Rows whose ids are random over the tables."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.integers(rows, size=ROWS, dtype=np.int32) for rows in SIZES.values()])
    return EncodedRows(rng.normal(size=(ROWS, 13)).astype(np.float32), ids)


def rows_per_cpu_s(predict: Callable[[], object]) -> float:
    """Of one pass over all rows."""
    started_s = time.process_time()
    predict()
    return ROWS / (time.process_time() - started_s)


def compare(model: str, precision: str, folder: Path, turns: int) -> dict[str, object]:
    """The best of some turns of each, and the largest difference of a probability."""
    bundle = Bundle.open(write_random_bundle(folder / "bundle", SIZES, precision, MODELS[model]))  # type: ignore[arg-type]
    write_onnx(bundle, folder / "model.onnx")
    rows, served = random_rows(), ServedModel(bundle)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    parts = [rows.part(start, start + BATCH_ROWS) for start in range(0, ROWS, BATCH_ROWS)]
    feeds = [onnx_inputs(bundle, part) for part in parts]

    def ours() -> np.ndarray:
        return np.concatenate([served.predict(part) for part in parts])

    def theirs() -> np.ndarray:
        return np.concatenate([session.run(None, feed)[0][:, 0] for feed in feeds])

    difference = float(np.abs(ours() - theirs()).max())
    rates = [(rows_per_cpu_s(ours), rows_per_cpu_s(theirs)) for _ in range(turns)]
    best_ours, best_theirs = (max(column) for column in zip(*rates, strict=True))
    weights_bytes = (folder / "bundle" / "weights.safetensors").stat().st_size
    return {
        "model": model,
        "tables": precision,
        "bundle_rows_per_cpu_s": round(best_ours),
        "onnxruntime_rows_per_cpu_s": round(best_theirs),
        "largest_difference": difference,
        "file_of_weights": (folder / "model.onnx").stat().st_size / weights_bytes,
    }


def main() -> None:
    """Print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for model in MODELS:
        for precision in TABLE_PRECISIONS:
            with tempfile.TemporaryDirectory() as folder:
                results.append(compare(model, precision, Path(folder), options.turns))
            print(*results[-1].values(), sep="\t", flush=True)
    about = {"processor": processor_name(), "onnxruntime": onnxruntime.__version__, "rows": ROWS, "batch": BATCH_ROWS}
    options.out.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
