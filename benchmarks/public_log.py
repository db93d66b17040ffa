"""A public log with behaviour and two labels, by models of ours, by LightGBM and by FuxiCTR's DIN, in one run.

    pip download --no-deps recbole && unzip recbole*.whl 'recbole/dataset_example/*'
    python benchmarks/public_log.py recbole/dataset_example/ml-100k --folder work --seeds 3 --json public_log.json

The log is MovieLens 100k (100,000 ratings of 943 users and 1,682 films, in the order of their time), as RecBole's wheel
brings it.  `like` is a rating of 4 or 5, `love` one of 5; `history` has the films that the user liked before, newest
last.  All read the rows of one dataset, whose last tenths by time are val and test, and are chosen by the AUC of `like`
in val; most users of test were not there in train.  LightGBM and FuxiCTR (whose wheel has its DIN) are left out where
they are not installed.
"""

import argparse
import importlib
import importlib.util
import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from torchdlrm import Dataset, binary_metrics, evaluate, load_config, load_schema, preprocess, train
from torchdlrm.data.dataset import rows_of_split
from torchdlrm.processor import describe_processor

MOST_LIKED, BATCH_ROWS, EPOCHS = 20, 128, 4
HISTORY = f'value_separator = "|", table = "item", max_values = {MOST_LIKED}, keep = "last"'
SCHEMA = f"""
name = "movies"
columns = [
    {{ role = "label", name = "like" }},
    {{ role = "label", name = "love" }},
    {{ role = "time", name = "timestamp", kind = "int" }},
    {{ role = "dense", name = "age", kind = "int", transform = "standardize" }},
    {{ role = "dense", name = "year", kind = "int", transform = "standardize" }},
    {{ role = "sparse", name = "user", kind = "int" }},
    {{ role = "sparse", name = "gender" }},
    {{ role = "sparse", name = "occupation" }},
    {{ role = "sparse", name = "item", kind = "int" }},
    {{ role = "sparse", name = "genres", value_separator = "|" }},
    {{ role = "sparse", name = "history", kind = "int", {HISTORY} }},
]
[split]
rule = "time"
val = 0.1
test = 0.1
"""
SETTINGS = {
    "model.embedding_dim": "16",
    "model.dense_arch_layer_sizes": "32,16",
    "model.over_arch_layer_sizes": "64,32,1",
    "train.batch_size_global": str(BATCH_ROWS),
    "train.epochs": str(EPOCHS),
}
BOTH = {"train.labels": "like,love"}
POOLED = {"model.features.history.pooling": "attention", "model.features.history.target": "item"}
VARIANTS: dict[str, dict[str, str]] = {
    "sum of the history": {"train.label": "like"},
    "attention (DIN)": {"train.label": "like", **POOLED},
    "attention, both labels": {**BOTH, **POOLED},
    "attention, both, MMoE": {**BOTH, **POOLED, "model.heads.kind": "mmoe"},
}


def log_of(folder: Path) -> pl.DataFrame:
    """The log: a row for each rating."""

    def table(kind: str) -> pl.DataFrame:
        found = pl.read_csv(folder / f"ml-100k.{kind}", separator="\t", infer_schema=False, quote_char=None)
        return found.rename({name: name.partition(":")[0] for name in found.columns})

    rows = table("inter").join(table("user"), on="user_id").join(table("item"), on="item_id", how="left")
    rows = rows.with_columns(pl.col("timestamp").cast(pl.Float64).cast(pl.Int64)).sort("timestamp", maintain_order=True)
    liked, history = defaultdict[str, list[str]](list), []
    for user, item, rating in rows.select("user_id", "item_id", "rating").iter_rows():
        history.append("|".join(liked[user][-MOST_LIKED:]))
        if float(rating) >= 4:
            liked[user].append(item)
    return rows.select(
        (pl.col("rating").cast(pl.Float64) >= 4).cast(pl.Int8).alias("like"),
        (pl.col("rating").cast(pl.Float64) >= 5).cast(pl.Int8).alias("love"),
        "timestamp",
        pl.col("age").cast(pl.Int64),
        pl.col("release_year").cast(pl.Int64, strict=False).alias("year"),
        pl.col("user_id").cast(pl.Int64).alias("user"),
        "gender",
        "occupation",
        pl.col("item_id").cast(pl.Int64).alias("item"),
        pl.col("class").str.replace_all(" ", "|").alias("genres"),
        pl.Series("history", history),
    )


def ours(dataset: Dataset, settings: dict[str, str], run: Path, seed: int) -> dict[str, float]:
    """The AUC of each label in test, of the best checkpoint by val."""
    every = {"validation.every_steps": str(dataset.splits["train"].rows // BATCH_ROWS), "seed": str(seed)}
    config = load_config("criteo-small", SETTINGS | every | settings)
    train(config, dataset, run, restart=run.exists(), progress=False)
    found = evaluate(run, dataset=dataset, split="test", progress=False)
    assert found is not None
    others = {name: of["auc"] for name, of in found.get("labels", {}).items()}
    return {"like": found["auc"], **others}


def frames_of(dataset: Dataset) -> dict[str, pl.DataFrame]:
    """Encoded rows of each split, in its order."""
    return {name: pl.concat(rows_of_split(dataset, name)) for name in ("train", "val", "test")}


def auc_of(labels: NDArray[Any], scores: NDArray[Any]) -> float:
    """The AUC of any scores."""
    found = binary_metrics(labels.astype(np.uint8), scores.astype(np.float32)).auc
    assert found is not None
    return found


def by_lightgbm(frames: dict[str, pl.DataFrame], label: str, seed: int) -> float:
    """Its AUC in test; the history is the ids of the last three liked films."""
    lightgbm: Any = importlib.import_module("lightgbm")
    names = ["age", "year", "user", "gender", "occupation", "item"]
    last = [pl.col("history").list.get(-1 - i, null_on_oob=True).fill_null(0).alias(f"last_{i}") for i in range(3)]
    categories = [*names[2:], "last_0", "last_1", "last_2"]
    columns = {name: frame.select(*names, *last).to_numpy().astype(np.float32) for name, frame in frames.items()}
    places = [len(names[:2]) + i for i in range(len(categories))]
    data = {
        name: lightgbm.Dataset(columns[name], frames[name][label].to_numpy(), categorical_feature=places)
        for name in ("train", "val")
    }
    how = {"objective": "binary", "metric": "auc", "verbose": -1, "seed": seed, "learning_rate": 0.05, "num_threads": 2}
    stop = lightgbm.early_stopping(50, verbose=False)
    model = lightgbm.train(how, data["train"], 1000, valid_sets=[data["val"]], callbacks=[stop])
    return auc_of(frames["test"][label].to_numpy(), np.asarray(model.predict(columns["test"], raw_score=True)))


def by_fuxictr(frames: dict[str, pl.DataFrame], sizes: dict[str, int], seed: int) -> float:
    """The AUC in test of its DIN, of the best epoch by val."""
    place = (
        Path(str(importlib.import_module("fuxictr").__file__)).parents[1] / "model_zoo" / "LongCTR" / "DIN" / "DIN.py"
    )
    spec = importlib.util.spec_from_file_location("fuxictr_din", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(seed)
    features = importlib.import_module("fuxictr.features").FeatureMap("movies", ".")
    features.labels, features.default_emb_dim = ["like"], 16
    features.features.update({name: {"type": "numeric", "source": "user"} for name in ("age", "year")})
    for name in ("user", "gender", "occupation", "item"):
        about = {"type": "categorical", "vocab_size": sizes[name] + 1, "padding_idx": 0}
        features.features[name] = about | {"source": "item" if name == "item" else "user"}
    features.num_fields = len(features.features)
    model = module.DIN(
        *(features, "DIN", -1, [64, 32]),
        embedding_dim=16,
        optimizer="adam",
        loss="binary_crossentropy",
        task="binary_classification",
        metrics=["AUC"],
        model_root="checkpoints",
        verbose=0,
    )

    def batch(frame: pl.DataFrame) -> tuple[Any, Any, Any]:
        # Its id 0 is padding; ours is the unknown value, so all are one more.
        plain = {name: torch.from_numpy(frame[name].to_numpy().copy()) for name in ("like", "age", "year")}
        plain |= {n: torch.from_numpy(frame[n].to_numpy() + 1) for n in ("user", "gender", "occupation")}
        items = np.zeros((frame.height, MOST_LIKED + 1), np.int64)
        for row, history in enumerate(frame["history"].to_list()):
            if history:
                items[row, MOST_LIKED - len(history) : MOST_LIKED] = np.array(history) + 1
        items[:, -1] = frame["item"].to_numpy() + 1
        mask = torch.from_numpy(items[:, :-1] > 0).float()
        return plain, {"item": torch.from_numpy(items.reshape(-1))}, mask

    def score(frame: pl.DataFrame) -> float:
        model.eval()
        with torch.no_grad():
            scores = [model.forward(batch(piece))["y_pred"] for piece in frame.iter_slices(4096)]
        return auc_of(frame["like"].to_numpy(), torch.cat(scores).logit().flatten().numpy())

    best = (0.0, 0.0)
    for _ in range(EPOCHS):
        model.train()
        for index, piece in enumerate(frames["train"].iter_slices(BATCH_ROWS)):
            model._batch_index, model._max_gradient_norm = index, 10.0  # as its `fit` sets them
            model.train_step(batch(piece))
        best = max(best, (score(frames["val"]), score(frames["test"])))
    return best[1]


def main() -> None:
    """Make the log, train all, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of ml-100k.inter, .user and .item")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    log, schema = options.folder / "movies.parquet", options.folder / "movies.toml"
    if not log.exists():  # a second time finds the dataset
        log_of(options.data).write_parquet(log)
    schema.write_text(SCHEMA)
    dataset = preprocess(log, options.folder / "dataset", schema=load_schema(schema))
    frames, found = frames_of(dataset), defaultdict[tuple[str, str], list[float]](list)
    seconds: dict[str, float] = defaultdict(float)
    here = {name: importlib.util.find_spec(name) is not None for name in ("lightgbm", "fuxictr")}
    for seed in range(options.seeds):
        for name, settings in VARIANTS.items():
            started_s = time.monotonic()
            for label, auc in ours(dataset, settings, options.folder / "run", seed).items():
                found[name, label].append(auc)
            seconds[name] += time.monotonic() - started_s
        if here["lightgbm"]:
            started_s = time.monotonic()
            for label in ("like", "love"):
                found["LightGBM", label].append(by_lightgbm(frames, label, seed))
            seconds["LightGBM"] += time.monotonic() - started_s
        if here["fuxictr"]:
            started_s = time.monotonic()
            found["FuxiCTR's DIN", "like"].append(by_fuxictr(frames, dataset.num_embeddings, seed))
            seconds["FuxiCTR's DIN"] += time.monotonic() - started_s
    print(describe_processor(), *(f"{name} is not installed" for name, there in here.items() if not there), sep="\n")
    rows = [
        {"model": name, "label": label, "auc": fmean(aucs), "sd": stdev(aucs) if len(aucs) > 1 else None}
        | {"seeds": len(aucs), "seconds": seconds[name] / len(aucs)}
        for (name, label), aucs in found.items()
    ]
    for row in rows:
        print(
            " ".join(
                f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if options.json:
        options.json.write_text(json.dumps({"processor": describe_processor(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
