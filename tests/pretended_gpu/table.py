# ruff: noqa: T201
"""Prints what a step costs its host on 1 GPU, as one of 8 and as one of 16; README.md says how to run it."""

import os
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pretend
from counted_steps import counted_steps
from one_rank import one_rank_of

from torchdlrm.config import load_config
from torchdlrm.data.dataset import Dataset
from torchdlrm.training.job import train

WARM_UP_STEPS, NUM_STEPS = 40, 160
ROWS_OF_TWO_NODES = '["cat_0=row_wise", "cat_1=table_row_wise"]'


def main(dataset):
    print("| ranks | ms a step | ms of the main thread | waits | launches | collectives | copies to the GPU |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for world_size, overrides in ((1, {}), (8, {}), (16, {"sharding.constraints": ROWS_OF_TWO_NODES})):
        config = load_config(
            "criteo-small",
            {
                "train.batch_size_global": "16384",
                "train.epochs": "100",
                "train.max_steps": str(NUM_STEPS),
                "logging.every_steps": "100000",
                "logging.tensorboard": "false",
                "validation.max_rows": "1000",
                **overrides,
            },
        )
        ranks = one_rank_of(world_size) if world_size > 1 else nullcontext()
        with tempfile.TemporaryDirectory() as folder, ranks, counted_steps(look_at=WARM_UP_STEPS) as steps:
            train(config, Dataset.open(dataset), Path(folder) / "run")
        # The last step logs. Steps before it are alike but for the ranks' agreement on whether to stop.
        counts = {
            name: statistics.median(row[name] for row in steps.counts[WARM_UP_STEPS:-1]) for name in pretend.COUNTS
        }
        # A busy machine only adds to a step: the quickest tenth is nearest to what it takes.
        wall_ms, thread_ms = (
            statistics.quantiles(ms[WARM_UP_STEPS:-1], n=10)[0] for ms in (steps.wall_ms, steps.thread_ms)
        )
        print(
            f"| {world_size} | {wall_ms:.2f} | {thread_ms:.2f} | {counts['waits']:g} | {counts['launches']:g} | "
            f"{counts['collectives']:g} | {counts['copies_to_gpu']:g} |",
            flush=True,
        )
        if "--waits" in sys.argv:
            for place, times in steps.waits.most_common():
                print(f"    {times} x {place}", flush=True)
    print(
        f"\n{NUM_STEPS - WARM_UP_STEPS} steps each, the quickest tenth; load of this machine {os.getloadavg()[0]:.1f} "
        f"on {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
