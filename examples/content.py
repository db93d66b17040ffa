"""Predict clicks on items that were never seen, by a vector of each, as an encoder makes it of a text or a picture.

    python examples/content.py FOLDER

The log is synthetic; its items are new all the time. A log of your own has such a column in Parquet, as lists of
floats: in Polars `log.join(vectors, on="item", how="left")`. A missing vector is fine.
"""

import sys
from pathlib import Path

import numpy as np

from torchdlrm import Predictor, evaluate, export, load_config, preprocess, synthesize, train


def main(folder: Path) -> None:
    """Learn the first rows, judge the last ones, and predict an item that no row has."""
    folder.mkdir(parents=True, exist_ok=True)
    truth = synthesize(folder / "log.tsv", rows=60_000, extras=("content",))
    preprocess(folder / "log.tsv", folder / "dataset", folder / "log.tsv.schema.toml")
    # A projection learns from every row: it can take larger steps than the other layers of a small DLRM.
    config = load_config("criteo-small", {"dense_optimizer.learning_rate": "0.02"})
    train(config, folder / "dataset", folder / "run")
    auc = evaluate(folder / "run", split="test")["auc"]
    print(f"AUC {auc:.4f} of {truth.splits['test'].auc:.4f} that can be reached; by ids alone it would be 0.5")
    predictor = Predictor(export(folder / "run", folder / "bundle").bundle)
    vector = np.ones(16, np.float32)
    rows = [
        {"user": 3, "item": 1, "content": vector},
        {"user": 3, "item": 1, "content": -vector},
        {"user": 3, "item": 1},
    ]
    print("an item, one of the opposite content, one of unknown content:", predictor.predict(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
