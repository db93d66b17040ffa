"""Encoded datasets equal what DuckDB computes from the same rows."""

import gzip
import random
from pathlib import Path

import duckdb
import pytest

from torchdlrm.features.schema import criteo_schema
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess

SAMPLES = Path(__file__).resolve().parents[2].parent / "shared" / "data"
MIN_COUNT, MAX_ROWS = 2, 1000
DENSE = [f"int_{i}" for i in range(13)]
SPARSE = [f"cat_{i}" for i in range(26)]


def made_up_log(path: Path) -> Path:
    """3,000 rows with missing values, negative and huge integers, short and upper-case hex, values of equal count."""
    rng = random.Random(7)
    lines = []
    for _ in range(3000):
        dense = [rng.choice(["", "0", "-1", "-3", str(int(rng.paretovariate(0.5)))]) for _ in DENSE]
        sparse = [
            rng.choice(["", f"{int(rng.paretovariate(1)) % 2**32:{rng.choice(['x', 'X', '08x'])}}"]) for _ in SPARSE
        ]
        lines.append("\t".join([rng.choice("0001"), *dense, *sparse]))
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.fixture(scope="module", params=["made up", "criteo_kaggle_sample.tsv.gz", "criteo_1tb_day_0_sample.tsv.gz"])
def encoded(request, tmp_path_factory):
    """A dataset, and DuckDB with the table `expected`: position, split, and the row as it should be encoded."""
    folder = tmp_path_factory.mktemp("duckdb")
    log = made_up_log(folder / "log.tsv.gz") if request.param == "made up" else SAMPLES / request.param
    if not log.exists():
        pytest.skip(f"{log} is not on this machine")
    options = PreprocessOptions(min_count=MIN_COUNT, max_embeddings=MAX_ROWS)
    dataset = preprocess([log], folder / "dataset", criteo_schema(), options, chunk_bytes=300_000)
    with duckdb.connect() as sql:
        expect(sql, log)
        yield dataset, sql


def expect(sql: duckdb.DuckDBPyConnection, log: Path) -> None:
    names = ["label", *DENSE, *SPARSE]
    sql.execute(f"""
        create table log as select row_number() over () - 1 as position, * from read_csv('{log}', delim='\t',
            header=false, quote='', escape='', nullstr='', all_varchar=true, parallel=false, names={names})
    """)
    (rows,) = sql.execute("select count(*) from log").fetchone()
    train = rows - rows // 7
    val = train + (rows // 7 + 1) // 2
    sql.execute(f"""
        create table cells as select position, label::tinyint as label,
            case when position < {train} then 'train' when position < {val} then 'val' else 'test' end as split,
            {", ".join(f"{name}::bigint as {name}" for name in DENSE)},
            {", ".join(f"lpad(lower({name}), 8, '0') as {name}" for name in SPARSE)} from log
    """)
    for name in SPARSE:
        sql.execute(f"""
            create table vocabulary_{name} as
            select {name} as value, count(*) as count,
                row_number() over (order by count(*) desc, {name} nulls first) as id
            from cells where split = 'train' group by {name} having count(*) >= {MIN_COUNT}
            order by id limit {MAX_ROWS - 1}
        """)
    dense = [f"ln(greatest(coalesce({name}, 0), -2) + 3.0::double)::float as {name}" for name in DENSE]
    ids = [f"coalesce(v_{name}.id, 0)::int as {name}" for name in SPARSE]
    joins = [f"left join vocabulary_{n} v_{n} on v_{n}.value is not distinct from cells.{n}" for n in SPARSE]
    sql.execute(f"""
        create table expected as select cells.position, cells.split, label, {", ".join([*dense, *ids])}
        from cells {" ".join(joins)}
    """)


def parquet(dataset, pattern):
    return f"read_parquet('{dataset.path}/{pattern}', file_row_number=true)"


def test_vocabularies_equal_an_independent_count(encoded):
    dataset, sql = encoded
    for name in SPARSE:
        found = sql.execute(
            f"select value, count, id from {parquet(dataset, f'vocabulary/{name}.parquet')} order by id"
        )
        rows = found.fetchall()
        assert rows == sql.execute(f"select value, count, id from vocabulary_{name} order by id").fetchall()
        assert dataset.num_embeddings[name] == len(rows) + 1


def test_val_and_test_are_the_expected_rows_in_the_order_of_the_log(encoded):
    dataset, sql = encoded
    columns = ", ".join(["label", *DENSE, *SPARSE])
    for split in ("val", "test"):
        files = parquet(dataset, f"{split}/*.parquet")
        found = sql.execute(f"select {columns} from {files} order by file_row_number").fetchall()
        expected = sql.execute(f"select {columns} from expected where split = '{split}' order by position").fetchall()
        assert found == expected
        assert dataset.splits[split].rows == len(expected)


def test_train_is_the_expected_rows_in_another_order(encoded):
    dataset, sql = encoded
    columns = ", ".join(["label", *DENSE, *SPARSE])
    found, expected = (
        f"select {columns} from {parquet(dataset, 'train/*.parquet')}",
        (f"select {columns} from expected where split = 'train'"),
    )
    assert sql.execute(f"select count(*) from ({found} except all {expected})").fetchone() == (0,)
    assert sql.execute(f"select count(*) from ({expected} except all {found})").fetchone() == (0,)
    assert (
        sql.execute(found + " limit 50").fetchall() != sql.execute(expected + " order by position limit 50").fetchall()
    )


def test_the_manifest_counts_clicks_and_unknown_and_missing_values(encoded):
    dataset, sql = encoded
    for name, split in dataset.manifest.splits.items():
        where = f"where split = '{name}'"
        assert sql.execute(f"select count(*), sum(label) from cells {where}").fetchone() == (split.rows, split.clicks)
        nulls = ", ".join(f"count(*) filter ({column} is null)" for column in [*DENSE, *SPARSE])
        found = tuple(split.missing_rows[column] for column in [*DENSE, *SPARSE])
        assert sql.execute(f"select {nulls} from cells {where}").fetchone() == found
        unknown = ", ".join(f"count(*) filter ({column} = 0)" for column in SPARSE)
        found = tuple(split.unknown_rows[column] for column in SPARSE)
        assert sql.execute(f"select {unknown} from expected {where}").fetchone() == found
