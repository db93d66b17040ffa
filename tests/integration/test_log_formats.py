"""A log format is one class in one file: added here, it is proposed for, preprocessed and predicted from."""

import polars as pl
import pyarrow as pa
import pytest

from helpers.raw_logs import learnable_rows
from torchdlrm.features.schema import criteo_schema
from torchdlrm.logs import find
from torchdlrm.logs.proposal.propose import propose_schema
from torchdlrm.logs.tables import TableFile, TableFormat
from torchdlrm.prediction.rows_in import RowsIn
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess

SCHEMA = criteo_schema()


class ArrowFormat(TableFormat):
    """Arrow's own files, a record batch at a time."""

    name, text_bytes_a_byte = "Arrow", 1.0

    def recognises(self, start, path):  # noqa: ARG002
        return start.startswith(b"ARROW1")

    def describe(self, file):
        with pa.memory_map(str(file.path)) as raw:
            reader = pa.ipc.open_file(raw)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            return TableFile(reader.schema, [batch.nbytes for batch in batches], [batch.num_rows for batch in batches])

    def table(self, file, groups, names):
        with pa.memory_map(str(file.path)) as raw:
            reader = pa.ipc.open_file(raw)
            return pa.Table.from_batches([reader.get_batch(i) for i in groups]).select(names)


@pytest.fixture
def logs(tmp_path):
    lines = learnable_rows(3_000)
    (tmp_path / "log.tsv").write_text("\n".join(lines) + "\n")
    names = [column.name for column in SCHEMA.columns]
    rows = pl.read_csv(tmp_path / "log.tsv", separator="\t", has_header=False, new_columns=names)
    table = rows.select(reversed(names)).to_arrow(compat_level=pl.CompatLevel.oldest())
    with pa.ipc.new_file(tmp_path / "log.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=500)
    return tmp_path / "log.tsv", tmp_path / "log.arrow"


def test_a_format_of_ones_own_is_read_wherever_a_log_is(logs, tmp_path, monkeypatch):
    monkeypatch.setattr(find, "LOG_FORMATS", (ArrowFormat(), *find.LOG_FORMATS))
    datasets = [
        preprocess([log], tmp_path / log.suffix, SCHEMA, PreprocessOptions(min_count=2), chunk_bytes=9_000)
        for log in logs
    ]
    assert datasets[0].manifest.splits == datasets[1].manifest.splits
    assert datasets[0].manifest.sparse == datasets[1].manifest.sparse
    read = [pl.concat(chunk.frame for chunk in RowsIn([log], SCHEMA, chunk_bytes=9_000)) for log in logs]
    assert read[1].select(read[0].columns).equals(read[0])
    proposal = propose_schema(logs[1], 1_000)
    assert {column["name"]: column["role"] for column in proposal.schema["columns"]}["label"] == "label"
    assert proposal.origin.startswith("1,000 rows from")
