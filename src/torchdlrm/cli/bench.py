"""`dlrm bench`: hot paths on this machine, compared with what users have today and with their physical floor."""

from pathlib import Path

from cyclopts import App

from torchdlrm.cli.options import Flag, Json, NotNegative, Overrides, Positive, split_config
from torchdlrm.cli.terminal import print_json, print_table, progress_bars, say
from torchdlrm.config import load_config
from torchdlrm.folders import expect

bench = App(name="bench", result_action="return_value")


@bench.command
def step(
    *config: Overrides,
    num_tables: Positive = 26,
    rows_per_table: Positive = 100_000,
    steps_per_round: Positive | None = None,
    rounds: Positive = 7,
    nproc_per_node: Positive = 1,
    busy: NotNegative = 0,
    parts: Flag = False,
    model_class: str | None = None,
    as_json: Json = False,
) -> None:
    """Time the training step: ours, plain TorchRec's, a plain torch loop's, the floor, and the host's part.

    The floor is the step's matrix products alone.

    Args:
        config: TOML file, the paper's model at batch 2,048 without it; then keys to override by their dotted names.
        num_tables: Sparse features, each with a table.
        rows_per_table: Rows of each table.
        steps_per_round: Steps of each competitor before the next has its turn; as many as half a second takes when not
            given, but at least 10.
        rounds: Turns of each competitor; medians are printed.
        nproc_per_node: Processes of each competitor.
        busy: Processes that keep cores busy meanwhile, as other programs of a machine may.
        parts: Print the milliseconds of our step by part, too.
        model_class: A model of your own, FILE.py:NAME or MODULE:NAME; TorchRec's is the same on its tables.
    """
    settings = load_config(*split_config(config))

    from torchdlrm.bench.step import benchmark_step

    with progress_bars("") as progress:
        result = benchmark_step(
            settings,
            num_embeddings={f"cat_{i}": rows_per_table for i in range(num_tables)},
            steps_per_round=steps_per_round,
            rounds=rounds,
            nproc=nproc_per_node,
            num_busy=busy,
            with_parts=parts,
            model_class=model_class,
            progress=progress,
        )
    batch_rows = result["batch_size_global"]
    beside = f", beside {result['num_busy_processes']} busy process(es)" if result["num_busy_processes"] else ""
    title = f"training step, batch {batch_rows:,}, {result['num_processes']} process(es) each{beside}"
    competitors = {
        "torchdlrm": ("ours", result["rows_per_s"]),
        "plain TorchRec": ("torchrec", result["torchrec_rows_per_s"]),
        "plain torch loop": ("plain_torch", result["plain_torch_rows_per_s"]),
        "floor: matrix products alone": ("floor", result["floor_rows_per_s"]),
    }
    rows = [
        {
            "": name,
            "rows/s": f"{rows_per_s:,.0f}",
            "ms a step": f"{1000 * batch_rows / rows_per_s:.2f}",
            "threads": str(result["num_threads"][key]),
            "steps a round": str(result["steps_per_round"][key]),
        }
        for name, (key, rows_per_s) in competitors.items()
        if rows_per_s is not None
    ]
    print_table(title, rows)
    say(f"processor: {result['processor']}")
    say(f"used of it: {result['instructions']}")
    say(f"precision of ours and of the floor: {result['precision']}; of the others: float32")
    loop = result["ratio_to_plain_torch"]
    say(
        f"{result['ratio_to_torchrec']:.2f} times plain TorchRec; "
        + (f"{loop:.2f} times the plain torch loop; " if loop is not None else "")
        + f"{result['ratio_to_floor_time']:.2f} times the floor's time"
    )
    say(f"host: {result['host_ms']:.2f} ms a step, whatever its rows")
    if result["parts_ms"] is not None:
        print_table(
            "a step of ours by part", [{"": part, "ms": f"{ms:.3f}"} for part, ms in result["parts_ms"].items()]
        )
    if as_json:
        print_json(result)


@bench.command
def predict(
    *config: Overrides,
    num_tables: Positive = 26,
    rows_per_table: Positive = 100_000,
    batch_rows: Positive = 2048,
    batches_per_round: Positive | None = None,
    log_rows: Positive | None = None,
    rounds: Positive = 7,
    folder: Path | None = None,
    as_json: Json = False,
) -> None:
    """Time predictions of a model with random weights: the served model and TorchRec's own, interleaved.

    Args:
        config: TOML file, the paper's model without it; then keys of `model` to override by their dotted names.
        num_tables: Sparse features, each with a table.
        rows_per_table: Rows of each table.
        batch_rows: Rows of a batch.
        batches_per_round: Batches of each competitor before the next has its turn; as many as half a second takes when
            not given, but at least 2.
        log_rows: Rows of the log that `dlrm predict` is timed with; as many as are predicted in half a second when not
            given, 10,000 to 100,000.
        rounds: Turns of each competitor; medians are printed.
        folder: Where to keep the weights meanwhile; the system's folder for temporary files when not given.
    """
    settings = load_config(*split_config(config))

    from torchdlrm.bench.predict import benchmark_predict

    with progress_bars("") as progress:
        result = benchmark_predict(
            settings.model,
            num_tables=num_tables,
            rows_per_table=rows_per_table,
            batch_rows=batch_rows,
            batches_per_round=batches_per_round,
            log_rows=log_rows,
            rounds=rounds,
            folder=folder,
            progress=progress,
        )
    rows = [
        {"": name, "rows/s": f"{rows_per_s:,.0f}", "ms a batch's rows": f"{1000 * batch_rows / rows_per_s:.2f}"}
        | {"of eager": f"{result['ratio_to_eager'][name]:.2f} x"}
        for name, rows_per_s in result["rows_per_s"].items()
    ]
    print_table(f"prediction, encoded rows in batches of {batch_rows:,}, {result['num_threads']} thread(s)", rows)
    if as_json:
        print_json(result)


@bench.command
def loader(
    dataset: Path,
    *,
    batch_size_global: Positive = 2048,
    max_rows: Positive = 1_000_000,
    rounds: Positive = 5,
    as_json: Json = False,
) -> None:
    """Time the loader alone, from the dataset's files to batches.

    Args:
        dataset: Folder written by `dlrm preprocess`.
        batch_size_global: Rows of a batch.
        max_rows: Training rows of a round, at most.
        rounds: Turns; the median is printed.
    """
    expect("dataset", dataset)
    from torchdlrm.bench.loader import benchmark_loader
    from torchdlrm.data.dataset import Dataset

    with progress_bars("") as progress:
        result = benchmark_loader(
            Dataset.open(dataset),
            batch_size_global=batch_size_global,
            max_rows=max_rows,
            rounds=rounds,
            progress=progress,
        )
    say(f"loader: {result['rows_per_s']:,.0f} rows/s in batches of {result['batch_size_global']:,}")
    if as_json:
        print_json(result)
