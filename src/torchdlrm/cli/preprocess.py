"""`dlrm preprocess`: a raw click log becomes a dataset."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from torchdlrm.cli.preprocess_summary import PhaseTimes, phase_record, print_phase, print_summary, result_record
from torchdlrm.cli.terminal import Json, print_json, progress_bars
from torchdlrm.errors import Interrupted
from torchdlrm.features.schema import load_schema, with_split
from torchdlrm.features.vocabulary import DEFAULT_MIN_COUNT
from torchdlrm.preprocessing.preprocess import PreprocessOptions, Resources, work_folder
from torchdlrm.preprocessing.preprocess import preprocess as run_preprocess
from torchdlrm.units import parse_bytes

Flag = Parameter(negative="")


def preprocess(
    logs: list[Path],
    *,
    out: Path,
    schema: str = "criteo",
    min_count: int = DEFAULT_MIN_COUNT,
    max_rows: int | None = None,
    seed: int = 0,
    max_bad_rows: int = 0,
    split: Literal["criteo", "order", "random", "time"] | None = None,
    val: float | None = None,
    test: float | None = None,
    vocabulary: Path | None = None,
    extend_vocabulary: Annotated[bool, Flag] = False,
    memory: str = "4GB",
    workers: int | None = None,
    cluster: str | None = None,
    restart: Annotated[bool, Flag] = False,
    as_json: Json = False,
) -> None:
    """Turn a raw click log into a dataset that can be trained on.

    A job that is interrupted, by whatever, goes on when the same command is given again.

    Args:
        logs: Files of the log, text (plain or gzipped) or Parquet, in the order of time (files named day_N are put in
            order).
        out: Folder to write the dataset to; must not exist.
        schema: What the columns are: the preset `criteo`, or a TOML file; `dlrm schema LOG` proposes one.
        min_count: A categorical value in fewer training rows than this has no id of its own.
        max_rows: Most rows that the embedding table of a feature may have; the rarest values lose their ids.
        seed: Seed of the order of the training rows, and of a random split.
        max_bad_rows: Skip up to this many rows that the schema cannot read.
        split: How rows are split, if not as the schema says.
        val: Share of the rows for val, if not as the schema says; not for the split `criteo`.
        test: Share of the rows for test, likewise.
        vocabulary: Encode with the vocabularies and dense statistics of this dataset.
        extend_vocabulary: Give new frequent values ids behind those of --vocabulary, which stay as they are.
        memory: Memory that the job may use, all in all; on a cluster, that of each worker process.
        workers: Tasks at a time; by default one a core.
        cluster: Address of a Dask scheduler whose workers do the work; they must see the same files.
        restart: Forget what an interrupted job has done, and start anew.
        as_json: Print one JSON object on standard output, and a JSON line a phase on standard error.
    """
    options = PreprocessOptions(
        min_count=min_count,
        max_rows=max_rows,
        seed=seed,
        max_bad_rows=max_bad_rows,
        vocabulary=vocabulary,
        extend_vocabulary=extend_vocabulary,
    )
    resources = Resources(memory_bytes=parse_bytes(memory, "memory"), workers=workers, cluster=cluster)
    columns = with_split(load_schema(schema), split, val, test)
    try:
        with progress_bars(f"preprocess into {out}") as progress:
            times = PhaseTimes(progress, on_phase=print_phase if as_json else None)
            dataset = run_preprocess(logs, out, columns, options, times, resources=resources, restart=restart)
    except KeyboardInterrupt as interrupt:
        msg = f"stopped; what is done is kept in {work_folder(out)}: the same command goes on from there"
        raise Interrupted(msg) from interrupt
    times.finish()
    print_summary(dataset, times.phases)
    if as_json:
        print_json(
            {"dataset": str(out), **result_record(dataset), "phases": [phase_record(phase) for phase in times.phases]}
        )
