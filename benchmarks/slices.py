"""How often slices are marked on a synthetic log where none is bad, how often a bad one is found, and what it costs.

    python benchmarks/slices.py --draws 500 --json slices.json

Labels are drawn anew from the log's true probabilities each time. Predictions are these probabilities, and columns are
shuffled so that none says anything: every mark is chance. Then one value of a column is predicted worse: by noise,
which makes its NE worse, or too high, which its calibration shows. The cost is that of many rows, sliced in six ways.
"""

import argparse
import json
import resource
import time
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl

from torchdlrm.judged import Judged
from torchdlrm.judging.slices import slices
from torchdlrm.processor import describe_processor
from torchdlrm.synthetic.model import LOGIT_UNITS, NUM_LOGITS
from torchdlrm.synthetic.rows import RowGenerator

BY = "cat_5,cat_8,int_2,cat_5*int_2"
BAD = "cat_5"


def main() -> None:
    """Draw, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--log-rows", type=int, default=32_768, help="of the log that is drawn")
    parser.add_argument("--rows", type=int, default=10_000_000, help="for the cost")
    parser.add_argument("--json", type=Path, help="write the measurements here, too")
    options = parser.parse_args()
    print(describe_processor())
    figures = {"draws": options.draws, **chances(options.draws, options.log_rows), **cost(options.rows)}
    for name, value in figures.items():
        print(f"{name:<44} {value:,.3f}" if isinstance(value, float) else f"{name:<44} {value:,}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def chances(draws: int, log_rows: int) -> dict[str, float]:
    """In which fraction of the draws something was marked, and of those with a bad slice it came first, marked."""
    rows = RowGenerator("criteo-kaggle", 3).rows(0, log_rows)
    names = ["label", *(f"int_{i}" for i in range(13)), *(f"cat_{i}" for i in range(26))]
    columns = pl.read_csv(BytesIO(rows.text), separator="\t", has_header=False, new_columns=names)
    truth = (((rows.outcomes >> 1) - NUM_LOGITS // 2) / LOGIT_UNITS).astype(np.float32)
    bad_value = columns[BAD].drop_nulls().value_counts(sort=True)[BAD][2]
    is_bad = columns[BAD].eq_missing(bad_value).to_numpy()
    half, found = log_rows // 2, Counter[str]()
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        labels = (rng.random(log_rows) < 1 / (1 + np.exp(-truth))).astype(np.uint8)
        shuffled = columns.select("cat_5", "cat_8", "int_2").sample(fraction=1, shuffle=True, seed=draw)
        judged = Judged.of(labels, truth)
        parts = [(Judged.of(labels[s], truth[s]), shuffled[s]) for s in (slice(half), slice(half, None))]
        noisy = [Judged.of(labels, truth + rng.normal(0, 0.3, log_rows).astype(np.float32)) for _ in range(2)]
        of_chance = {
            "marked by chance": slices(judged, shuffled, BY),
            "marked by chance, weighted": slices(
                Judged.of(labels, truth, rng.choice([0.5, 1.0, 3.0], log_rows)), shuffled, BY
            ),
            "marked by chance between two models": slices(noisy[1], shuffled, BY, first=noisy[0]),
            "marked by chance as drift": slices(*parts[1], BY, before=parts[0]),
        }
        found.update(name for name, slices_of in of_chance.items() if slices_of[0].p_value < 0.05)
        for name, change in (("noise 1.0", rng.normal(0, 1.0, log_rows)), ("logits + 0.5", 0.5)):
            worst = slices(Judged.of(labels, np.where(is_bad, truth + change, truth)), columns, BY)[0]
            found[f"bad slice found: {name}"] += worst.name == f"{BAD} = {bad_value}" and worst.p_value < 0.05
    return {
        "rows of the bad slice": int(is_bad.sum()),
        **{name: count / draws for name, count in sorted(found.items())},
    }


def cost(num_rows: int) -> dict[str, float]:
    """Seconds and memory of six ways to slice, most by 20 values and the rest."""
    rng = np.random.default_rng(0)
    values = pl.Series([f"{value:08x}" for value in rng.integers(0, 2**32, 1_000)])
    columns = pl.DataFrame(
        {f"cat_{i}": values.gather(np.minimum(rng.zipf(1.3, num_rows), 1_000) - 1) for i in range(3)}
        | {"int_0": rng.geometric(0.01, num_rows)}
    )
    logits = rng.normal(-1, 1, num_rows).astype(np.float32)
    judged = Judged.of((rng.random(num_rows) < 1 / (1 + np.exp(-logits))).astype(np.uint8), logits)
    before_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    started_s, cpu_s = time.perf_counter(), time.process_time()
    found = slices(judged, columns, "cat_0,cat_1,cat_2,int_0,cat_0*cat_1,cat_0*int_0")
    return {
        "rows": num_rows,
        "slices": len(found),
        "seconds": time.perf_counter() - started_s,
        "processor seconds": time.process_time() - cpu_s,
        "GB at most, of which before": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "GB before": before_gb,
    }


if __name__ == "__main__":
    main()
