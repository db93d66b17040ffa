"""`dlrm preprocess`: a raw click log becomes a dataset."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from torchdlrm.cli.preprocess_summary import PhaseTimes, phase_record, print_phase, print_summary, result_record
from torchdlrm.cli.terminal import Json, print_json, progress_bars
from torchdlrm.errors import ConfigError, Interrupted
from torchdlrm.features.schema import load_schema, with_split
from torchdlrm.preprocessing.preprocess import PreprocessOptions, Resources, work_folder
from torchdlrm.preprocessing.preprocess import preprocess as run_preprocess


def preprocess(
    logs: list[Path],
    *,
    out: Path,
    schema: str = "criteo",
    options: PreprocessOptions = PreprocessOptions(),  # noqa: B008 - frozen, and what the parser fills
    split: Literal["criteo", "order", "random", "time"] | None = None,
    val: float | None = None,
    test: float | None = None,
    resources: Resources = Resources(),  # noqa: B008 - likewise
    restart: Annotated[bool, Parameter(negative="")] = False,
    max_rows: Annotated[str | None, Parameter(show=False)] = None,
    as_json: Json = False,
) -> None:
    """Turn a raw click log into a dataset that can be trained on.

    A job that is interrupted, by whatever, is resumed when the same command is given again.

    Args:
        logs: Files of the log, text (plain or gzipped) or Parquet, in the order of time (files named day_N are put in
            order).
        out: Folder to write the dataset to; must not exist.
        schema: What the columns are: the preset `criteo`, or a TOML file; `dlrm schema LOG` proposes one.
        options: what the dataset depends on.
        split: How rows are split, if not as the schema says.
        val: Fraction of the rows for val, if not as the schema says; not for the split `criteo`.
        test: Fraction of the rows for test, likewise.
        resources: of the machine.
        restart: Forget what an interrupted job has done, and start again.
        max_rows: What `--max-embeddings` was called.
        as_json: Print one JSON object on standard output, and a JSON line a phase on standard error.
    """
    if max_rows is not None:
        raise ConfigError("--max-rows: is called --max-embeddings now")
    columns = with_split(load_schema(schema), split, val, test)
    try:
        with progress_bars(f"preprocess into {out}") as progress:
            times = PhaseTimes(progress, on_phase=print_phase if as_json else None)
            dataset = run_preprocess(logs, out, columns, options, times, resources=resources, restart=restart)
    except KeyboardInterrupt as interrupt:
        msg = f"stopped; what is done is kept in {work_folder(out)}: the same command resumes it"
        raise Interrupted(msg) from interrupt
    times.finish()
    print_summary(dataset, times.phases)
    if as_json:
        print_json(
            {"dataset": str(out), **result_record(dataset), "phases": [phase_record(phase) for phase in times.phases]}
        )
