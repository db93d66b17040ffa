"""Predictions by a Dask cluster whose workers share nothing but a bucket."""

import signal
from dataclasses import replace

import pytest

from helpers.dask_cluster import running_cluster
from torchdlrm.errors import LogError
from torchdlrm.prediction.files import predict_file, work_folder
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.prediction.rows_in import RowsIn
from torchdlrm.progress import SilentProgress
from torchdlrm.storage import objects
from torchdlrm.storage.places import located


class Stops(SilentProgress):
    """As Ctrl-C when the first chunk is written; counts them."""

    def __init__(self, *, stops=True):
        self.num_chunks, self.stops = 0, stops

    def advance(self, *_, **__):
        self.num_chunks += 1
        if self.stops:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_a_cluster_predicts_the_same_bytes_also_when_it_was_interrupted(small_bundle, small_log, bucket, tmp_path):
    lines = small_log.read_text().splitlines(keepends=True)
    logs = [tmp_path / f"{i}.tsv" for i in range(4)]
    for i, path in enumerate(logs):
        path.write_text("".join(lines[i::4]))
    predictor = Predictor.open(small_bundle)

    def rows():
        return RowsIn(logs, predictor.schema, passthrough=["label"], chunk_bytes=1 << 16)

    here = {name: predict_file(predictor, rows(), tmp_path / name) for name in ("a.csv.gz", "a.parquet")}
    with running_cluster(tmp_path, apart=True) as (address, workers, _):
        out = located(f"{bucket}/scores/a.parquet")
        with pytest.raises(KeyboardInterrupt):
            predict_file(predictor, rows(), out, cluster=address, progress=Stops())
        journal = (work_folder(out) / "journal.jsonl").read_text().splitlines()
        assert journal
        assert not out.exists()
        there = predict_file(predictor, rows(), out, cluster=address, progress=Stops(stops=False))
        assert objects.read(f"{bucket}/scores/a.parquet") == (tmp_path / "a.parquet").read_bytes()
        assert list(objects.listed(bucket)) == ["scores/a.parquet"], "and nothing else is there"
        assert replace(there, duration_s=0) == replace(here["a.parquet"], duration_s=0)
        workers[0].send_signal(signal.SIGKILL)
        predict_file(predictor, rows(), tmp_path / "b.csv.gz", cluster=address)
        assert (tmp_path / "b.csv.gz").read_bytes() == (tmp_path / "a.csv.gz").read_bytes()
        assert not work_folder(tmp_path / "b.csv.gz").exists()
        logs[2].write_text("1\t2\n")
        with pytest.raises(LogError, match=r"2\.tsv, line 1"):
            predict_file(predictor, rows(), tmp_path / "c.csv", cluster=address)
