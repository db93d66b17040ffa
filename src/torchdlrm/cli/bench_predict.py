"""`dlrm bench predict`: predictions from encoded batches, beside TorchRec's own modules, and from a log."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.table import Table

from torchdlrm.cli.terminal import Json, console, print_json, progress_bars

Positive = Annotated[int, Parameter(validator=Number(gte=1))]


def predict(
    *,
    num_tables: Positive = 26,
    rows_per_table: Positive = 100_000,
    batch_rows: Positive = 2048,
    batches_per_round: Positive = 10,
    log_rows: Positive = 100_000,
    rounds: Positive = 7,
    folder: Path | None = None,
    as_json: Json = False,
) -> None:
    """Time predictions of the paper's model: the served model and TorchRec's own, interleaved.

    Parameters
    ----------
    num_tables
        Sparse features, each with a table.
    rows_per_table
        Rows of each table.
    batch_rows
        Rows of a batch.
    batches_per_round
        Batches of each competitor before the next has its turn.
    log_rows
        Rows of the log that `dlrm predict` is timed with.
    rounds
        Turns of each competitor; medians are printed.
    folder
        Where to keep the weights meanwhile; the system's folder for temporary files when not given.
    as_json
        Print one JSON object on standard output.
    """
    from torchdlrm.bench.predict import benchmark_predict

    with progress_bars("") as progress:
        result = benchmark_predict(
            num_tables=num_tables,
            rows_per_table=rows_per_table,
            batch_rows=batch_rows,
            batches_per_round=batches_per_round,
            log_rows=log_rows,
            rounds=rounds,
            folder=folder,
            progress=progress,
        )
    table = Table(title=f"prediction, encoded rows in batches of {batch_rows:,}, {result.num_threads} thread(s)")
    for column in ("", "rows/s", "ms a batch's rows", "of eager"):
        table.add_column(column, justify="right" if column else "left")
    for name, rows_per_s in result.rows_per_s.items():
        ratio = f"{result.ratio_to_eager[name]:.2f} x"
        table.add_row(name, f"{rows_per_s:,.0f}", f"{1000 * batch_rows / rows_per_s:.2f}", ratio)
    console.print(table)
    if as_json:
        print_json(result.as_dict())
