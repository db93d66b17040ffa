"""What vectors of content bring for items that were never seen: by seed, on a synthetic log whose truth is known.

    python benchmarks/content.py --seeds 5 --json content.json

In the log of `dlrm synthesize --content` a click depends on what the group of a user likes in the vector of an item,
and new items come all the time: those at the end were never learnt. Each model learns the same rows with other columns.
"""

import argparse
import json
import tempfile
import tomllib
from pathlib import Path
from statistics import mean

import polars as pl

from torchdlrm import evaluate, load_config, preprocess, synthesize, train
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.processor import processor_name

# Which columns are ignored, and how many of the vectors are missing.
VARIANTS = {
    "ids alone": (("content",), 0.0),
    "ids and vectors": ((), 0.0),
    "vectors without the item's id": (("item",), 0.0),
    "ids and vectors, 20 % missing": ((), 0.2),
}


def learnt(folder: Path, ignored: tuple[str, ...], missing: float, config: dict[str, str]) -> float:
    """The AUC on the last rows of a model that has learnt the first ones."""
    layout = tomllib.loads((folder / "log.tsv.schema.toml").read_text())
    changed = [{"role": "ignore", "name": column["name"]} for column in layout["columns"]]
    layout["columns"] = [
        new if new["name"] in ignored else old for old, new in zip(layout["columns"], changed, strict=True)
    ]
    log = folder / "log.tsv"
    if missing:
        frame, is_lost = pl.read_csv(log, separator="\t", infer_schema=False), pl.int_range(pl.len()).hash(1) % 100
        lost = pl.when(is_lost >= 100 * missing).then("content").alias("content")
        log = folder / "with_missing.tsv"
        frame.with_columns(lost).write_csv(log, separator="\t", quote_style="never")
    here = Path(tempfile.mkdtemp(dir=folder))
    dataset, run = here / "dataset", here / "run"
    preprocess(log, dataset, FeatureSchema.model_validate(layout), progress=False)
    train(load_config("criteo-small", config), dataset, run, progress=False)
    metrics = evaluate(run, split="test", progress=False)
    assert metrics is not None, "on the one process"
    return float(metrics["auc"])


def main() -> None:
    """Make a log of each seed, learn it with and without its vectors, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dense-rate", default="0.02", help="learning rate of the dense parts")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    found: dict[str, list[float]] = {"attainable": [], **{name: [] for name in VARIANTS}}
    for seed in range(options.seeds):
        config = {"seed": str(seed), "dense_optimizer.learning_rate": options.dense_rate}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            truth = synthesize(folder / "log.tsv", rows=options.rows, seed=seed, extras=("content",), progress=False)
            found["attainable"].append(truth.splits["test"].auc)
            for variant, (ignored, missing) in VARIANTS.items():
                found[variant].append(learnt(folder, ignored, missing, config))
    attainable = mean(found["attainable"])
    print(f"{'':32}{'AUC':>8}{'least':>8}{'most':>8}{'of attainable above 0.5':>26}")
    for variant, values in found.items():
        share = (mean(values) - 0.5) / (attainable - 0.5)
        print(f"{variant:32}{mean(values):8.4f}{min(values):8.4f}{max(values):8.4f}{share:26.1%}")
    if options.json:
        about = {"processor": processor_name(), "rows": options.rows, "dense_rate": options.dense_rate}
        options.json.write_text(json.dumps({**about, "auc": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
