"""How often the interval of a feature's importance holds the true one, on a synthetic log.

    python benchmarks/importance.py --draws 200 --json importance.json

A small model learns a fifth of a synthetic log in which two columns were shuffled, so that they say nothing. Rows are
then drawn again and again from the rest, each time with another permutation. The true importance of a shuffled column
is 0; that of another one is its mean over all draws.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from torchdlrm import export, importance, load_config, preprocess, synthesize, train
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.features.schema import SplitRule, criteo_schema

SHUFFLED, OTHERS = ("int_3", "cat_7"), ("int_0", "int_4", "cat_19", "cat_4")


def main() -> None:
    """Make the log and the model, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--rows", type=int, default=2_000, help="of a draw")
    parser.add_argument("--log-rows", type=int, default=400_000)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_model(Path(folder), options.log_rows)
        several = [
            importance(
                bundle,
                Path(folder) / "dataset",
                features=[*SHUFFLED, *OTHERS],
                max_rows=options.rows,
                seed=seed,
                progress=False,
            ).differences
            for seed in range(options.draws)
        ]
    found = []
    for name in (*SHUFFLED, *OTHERS):
        changes = [differences[f"without {name}"]["logloss"] for differences in several]
        values, (low, high) = (
            np.array([one.difference for one in changes]),
            np.array([one.interval for one in changes]).T,
        )
        true = 0.0 if name in SHUFFLED else float(values.mean())
        holds = float(((low <= true) & (true <= high)).mean())
        used = float(np.mean([one.verdict == "worse" for one in changes]))
        errors = float(np.mean([one.rows_error for one in changes]))
        found.append(
            {"feature": name, "true": true, "holds": holds, "used": used, "scatter": float(values.std(ddof=1))}
        )
        found[-1]["standard_error"] = errors
        print(
            f"{name:<7} true {true:+.5f}  holds {holds:.3f}  used {used:.3f}  scatter {values.std(ddof=1):.5f}",
            end="  ",
        )
        print(f"standard error {errors:.5f}")
    if options.json:
        about = {"draws": options.draws, "rows": options.rows, "features": found}
        options.json.write_text(json.dumps(about, indent=1) + "\n")


def make_model(folder: Path, rows: int) -> Bundle:
    """A bundle, of which `folder` also has the dataset."""
    schema = criteo_schema()
    synthesize(folder / "log.tsv", rows=rows, seed=1, progress=False)
    names = ["label", *(column.name for column in schema.features)]
    log = pl.read_csv(folder / "log.tsv", separator="\t", has_header=False, new_columns=names, infer_schema=False)
    log = log.with_columns(pl.col(name).shuffle(1) for name in SHUFFLED)
    log.write_csv(folder / "log.tsv", separator="\t", include_header=False)
    schema = schema.model_copy(update={"split": SplitRule(rule="order", val=0.1, test=0.7)})
    preprocess([folder / "log.tsv"], folder / "dataset", schema, progress=False)
    train(
        load_config("criteo-small", {"logging.tensorboard": "false"}),
        folder / "dataset",
        folder / "run",
        progress=False,
    )
    return export(folder / "run", folder / "bundle", progress=False).bundle


if __name__ == "__main__":
    main()
