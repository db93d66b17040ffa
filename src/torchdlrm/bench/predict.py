"""Measures predictions: the served model and TorchRec's own modules with the same weights, and from raw rows.

Competitors run interleaved, each in its own process: TorchRec's class as it is trained (eager, float32), the same after
`torchrec.inference.modules.quantize_embeddings` (int8), and the served model at several precisions, all on encoded
batches; and what `dlrm predict` does, from a log of text to a file of scores.

B rows of the batch, F sparse features.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torchrec.inference.modules import quantize_embeddings

from torchdlrm.bench.competitors import check_torchrec_has, random_rows, torchrec_dlrm, torchrec_kjt
from torchdlrm.bench.interleaved import Competitor, Step, choose_steps, take_turns
from torchdlrm.bench.random_bundle import write_random_bundle, write_random_log
from torchdlrm.bundle import DensePrecision, TablePrecision
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.config import ModelConfig
from torchdlrm.prediction.files import predict_file
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.prediction.rows_in import RowsIn
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.training.processes.process_group import Ranks

SERVED: tuple[tuple[TablePrecision, DensePrecision], ...] = tuple(
    (tables, dense) for dense in get_args(DensePrecision) for tables in get_args(TablePrecision)
)
EAGER, QUANTIZED = "TorchRec eager, float32", "TorchRec quantized, int8"
FROM_LOG = "dlrm predict from text, int8, bfloat16"
_MIN_BATCHES = 2  # a batch of a large model takes a second
_MIN_LOG_ROWS, _MAX_LOG_ROWS = 10_000, 100_000


def benchmark_predict(
    config: ModelConfig,
    *,
    num_tables: int,
    rows_per_table: int,
    batch_rows: int,
    rounds: int,
    batches_per_round: int | None = None,
    log_rows: int | None = None,
    folder: Path | None = None,
    progress: ProgressListener = SILENT,
) -> dict[str, Any]:
    """Measure predictions of a model with random weights: of random batches in memory, and of a random log.

    The arguments are those of `dlrm bench predict`; `folder` needs 6 bytes a weight and 270 a row of the log.  One
    round more is run than counts: the first warms up.

    Returns:
        Medians over rounds and what they were measured on, as `--json` prints it:

        rows_per_s: of each competitor.
        ratio_to_eager: median of the rounds' ratios, of each competitor over TorchRec's eager model.
        batch_rows: rows of a batch.
        batches_per_round: of each competitor.
        log_rows: rows of the log.
        num_threads: of torch in each process.
        rounds: how often each was measured.

    Raises:
        ConfigError: TorchRec has no such model to compare with.
    """
    check_torchrec_has(config)
    sizes = {f"cat_{i}": rows_per_table for i in range(num_tables)}
    table_precisions = list(dict.fromkeys(tables for tables, _ in SERVED))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        progress.start_phase("bench predict: write bundles", len(table_precisions), unit="bundles")
        bundles = {}
        for tables in table_precisions:
            path, for_raw_rows = Path(scratch) / tables, tables == "int8"
            bundles[tables] = write_random_bundle(path, sizes, tables, config, for_raw_rows=for_raw_rows)
            progress.advance(1)

        def start(step: Callable[..., Step], *arguments: object) -> Competitor:
            return Competitor(step, *arguments, nproc=1, device="cpu")

        competitors = {
            EAGER: start(eager_step, bundles["float32"], batch_rows),
            QUANTIZED: start(quantized_step, bundles["float32"], batch_rows),
        }
        for tables, dense in SERVED:
            name = f"served, {tables} tables, {dense} products"
            competitors[name] = start(served_step, bundles[tables], batch_rows, dense)
        batches = choose_steps(
            "bench predict: prepare", competitors, progress, steps=batches_per_round, at_least=_MIN_BATCHES
        )
        if log_rows is None:  # a turn of theirs is as long as the others', about
            log_rows = min(_MAX_LOG_ROWS, max(_MIN_LOG_ROWS, batches[name] * batch_rows))
        log = write_random_log(Path(scratch) / "log.tsv", sizes, log_rows)
        competitors[FROM_LOG] = start(from_log_step, bundles["int8"], log)
        found = take_turns("bench predict", competitors, batches | {FROM_LOG: 1}, rounds, progress)
    rows = dict.fromkeys(batches, batch_rows) | {FROM_LOG: log_rows}
    return {
        "rows_per_s": {name: found.rate(name, number) for name, number in rows.items()},
        "ratio_to_eager": {name: found.ratio(EAGER, name) * number / batch_rows for name, number in rows.items()},
        "batch_rows": batch_rows,
        "batches_per_round": batches,
        "log_rows": log_rows,
        "num_threads": len(os.sched_getaffinity(0)),
        "rounds": rounds,
    }


def served_step(_: Ranks, bundle_path: Path, batch_rows: int, dense_precision: DensePrecision) -> Step:
    """What the server does with encoded rows."""
    bundle = Bundle.open(bundle_path)
    model = ServedModel(bundle, dense_precision)
    batches = itertools.cycle([EncodedRows(dense, ids_FB) for dense, ids_FB in _random_batches(bundle, batch_rows)])
    return lambda: model.predict(next(batches))


def from_log_step(_: Ranks, bundle_path: Path, log: Path) -> Step:
    """What `dlrm predict` does."""
    bundle = Bundle.open(bundle_path)
    bundle.manifest = bundle.manifest.model_copy(update={"dense_precision": "bfloat16"})
    predictor = Predictor(bundle)
    rows = RowsIn([log], predictor.schema)
    return lambda: predict_file(predictor, rows, log.with_name("scores.parquet"))


def eager_step(_: Ranks, bundle_path: Path, batch_rows: int) -> Step:
    """TorchRec's own model as it is trained."""
    bundle = Bundle.open(bundle_path)
    return _torchrec_step(torchrec_model(bundle), bundle, batch_rows)


def quantized_step(_: Ranks, bundle_path: Path, batch_rows: int) -> Step:
    """TorchRec's own model, its tables quantised as TorchRec does it."""
    bundle = Bundle.open(bundle_path)
    model = quantize_embeddings(torchrec_model(bundle), dtype=torch.qint8, inplace=True)
    return _torchrec_step(model, bundle, batch_rows)


def torchrec_model(bundle: Bundle) -> Any:
    """TorchRec's own class of the model, with the weights of a float32 bundle."""
    num_embeddings = {name: record.num_embeddings for name, record in bundle.manifest.sparse.items()}
    cpu = torch.device("cpu")
    model = torchrec_dlrm(bundle.shape, num_embeddings, tables=cpu, dense=cpu)
    model.load_state_dict({name: bundle.weights.tensor(name) for name in model.state_dict()})
    return model.eval()


def _torchrec_step(model: Any, bundle: Bundle, batch_rows: int) -> Step:
    batches = itertools.cycle(
        [
            (torch.from_numpy(dense), torchrec_kjt(bundle.manifest.sparse, ids_FB))
            for dense, ids_FB in _random_batches(bundle, batch_rows)
        ]
    )

    def step() -> None:
        with torch.inference_mode():
            torch.sigmoid(model(*next(batches))).squeeze(1).numpy()

    return step


def _random_batches(bundle: Bundle, num_rows: int) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    sizes = [record.num_embeddings for record in bundle.manifest.sparse.values()]
    return random_rows(sizes, num_rows, np.random.default_rng(0), np.int32)
