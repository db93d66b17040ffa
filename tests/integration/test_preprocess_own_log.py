"""A log of the user's own, as CSV and as Parquet, against DuckDB reading the same file."""

import csv
import gzip
import json
import random

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import orc

from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import LogError
from torchdlrm.features.encode import encode
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.schema_file import load_schema
from torchdlrm.logs.find import find_files
from torchdlrm.logs.formats.text import parse_chunk
from torchdlrm.logs.lines import plan_chunks, read_chunks
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess

SCHEMA_TEXT = """
name = "shop"
separator = ","
quote = '"'
header = true
columns = [
    { role = "time", name = "time", kind = "datetime" },
    { role = "label", name = "spent", threshold = 10.0 },
    { role = "dense", name = "age", kind = "int", transform = "log1p" },
    { role = "dense", name = "price", kind = "float", transform = "none" },
    { role = "sparse", name = "city", header_name = "the city", kind = "string", min_count = 4 },
    { role = "sparse", name = "shop", kind = "int", max_embeddings = 20 },
    { role = "sparse", name = "tags", kind = "string", value_separator = "|", max_values = 3 },
    { role = "sparse", name = "user", kind = "string", hash = 97 },
    { role = "ignore", name = "note" },
]

[split]
rule = "time"
val = 0.2
test = 0.1
"""
CITIES = ["Köln", "東京", "Paris, Texas", 'the "Big" Apple', "two\nlines", "", "", " spaces ", "🙂", "#", "a\\b"]


def rows(num_rows):
    rng = random.Random(11)
    for i in range(num_rows):
        yield {
            "time": f"2024-0{rng.randrange(1, 10)}-{rng.randrange(10, 29)} {rng.randrange(10, 24)}:00:00",
            "spent": rng.choice(["0", "9.99", "10", "1e3", "0.5"]),
            "age": rng.choice(["", "0", "17", "-4", "99"]),
            "price": rng.choice(["", "1.5", "-2e-3", "1000000.25"]),
            "the city": rng.choice(CITIES) or (f"c{rng.randrange(60)}" if i % 2 else ""),
            "shop": rng.choice(["", str(rng.randrange(-30, 60)), "9223372036854775807"]),
            "tags": "|".join(
                rng.choice(["red", "grün", "x,y", f"t{rng.randrange(50)}"]) for _ in range(rng.randrange(6))
            ),
            "user": rng.choice(["", f"u{rng.randrange(1000)}"]),
            "note": rng.choice(["", "a\n,b", '""']),
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "schema.toml").write_text(SCHEMA_TEXT, encoding="utf-8")
    with (folder / "log.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(next(rows(1))), lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows(3000))
    return folder


@pytest.fixture(scope="module")
def schema(folder):
    return load_schema(str(folder / "schema.toml"))


@pytest.fixture(scope="module")
def dataset(folder, schema):
    return preprocess(
        [folder / "log.csv"], folder / "dataset", schema, PreprocessOptions(min_count=2), chunk_bytes=9000
    )


@pytest.fixture(scope="module")
def sql(folder, dataset):
    with duckdb.connect() as sql:
        sql.execute(f"""
            create table log as select row_number() over () - 1 as position, * from read_csv('{folder}/log.csv',
                header=true, delim=',', quote='"', escape='"', all_varchar=true, nullstr='', parallel=false)
        """)
        sql.execute("""
            create table times as select position, time::timestamp as moment, count(*) over () as num_rows,
                row_number() over (order by time::timestamp, position) - 1 as rank from log
        """)
        # A row is held out when its time is not before that of the first row that must be.
        sql.execute("""
            create table splits as select position, case
                when moment >= (select moment from times where rank = num_rows - 300) then 'test'
                when moment >= (select moment from times where rank = num_rows - 900) then 'val'
                else 'train' end as split
            from times
        """)
        sql.execute("""
            create table cells as select position, split, (spent::double >= 10)::tinyint as spent,
                ln(greatest(coalesce(age::bigint, 0), 0) + 1.0::double)::float as age,
                coalesce(price::double, 0)::float as price, "the city" as city, shop::bigint as shop,
                list_filter(string_split(coalesce(tags, ''), '|'), lambda tag: tag <> '')[1:3] as tags, "user"
            from log join splits using (position)
        """)
        for name, values, least, most in (
            ("city", "select city as value from cells where split = 'train'", 4, 2**31),
            ("shop", "select shop as value from cells where split = 'train'", 2, 19),
            ("tags", "select unnest(tags) as value from cells where split = 'train'", 2, 2**31),
        ):
            sql.execute(f"""
                create table vocabulary_{name} as select value, count(*) as count,
                    row_number() over (order by count(*) desc, value nulls first) as id
                from ({values}) group by value having count(*) >= {least} order by id limit {most}
            """)
        sql.execute("""
            create table expected as select cells.position, split, spent, age, price, coalesce(c.id, 0) as city,
                coalesce(s.id, 0) as shop,
                list_transform(tags, lambda tag: coalesce(ids.of_tags[tag], 0)) as tags
            from cells left join vocabulary_city c on c.value is not distinct from cells.city
            left join vocabulary_shop s on s.value is not distinct from cells.shop
            cross join (select map(list(value), list(id)) as of_tags from vocabulary_tags) ids
        """)
        yield sql


@pytest.mark.parametrize("name", ["city", "shop", "tags"])
def test_vocabularies_equal_duckdbs(dataset, sql, name):
    found = dataset.vocabulary(name).table.rows()
    assert found == sql.execute(f"select value, count, id from vocabulary_{name} order by id").fetchall()
    assert len(found) > 15


def test_every_row_of_every_split_equals_duckdbs(dataset, sql):
    columns = "spent, age, price, city, shop, tags"
    for split in ("train", "val", "test"):
        files = f"read_parquet('{dataset.path}/{split}/*.parquet', file_row_number=true)"
        expected = sql.execute(f"select {columns} from expected where split = '{split}' order by position").fetchall()
        order = "" if split == "train" else "order by file_row_number"
        found = sql.execute(f"select {columns} from {files} {order}").fetchall()
        if split == "train":
            found, expected = sorted(map(repr, found)), sorted(map(repr, expected))
        assert found == expected
        assert dataset.splits[split].rows == len(expected) > 100


def test_the_manifest_counts_what_duckdb_counts(dataset, sql):
    for name, split in dataset.manifest.splits.items():
        found = sql.execute(f"""
            select sum(spent), count(*) filter (city = 0), count(*) filter (len(tags) = 0), sum(len(tags)),
                sum(len(list_filter(tags, lambda id: id = 0))) from expected where split = '{name}'
        """).fetchone()
        assert found == (
            split.clicks,
            split.unknown_rows["city"],
            split.missing_rows["tags"],
            split.values["tags"],
            split.unknown_rows["tags"],
        )
        missing = sql.execute(f"select count(*) from cells where split = '{name}' and \"user\" is null").fetchone()
        assert missing == (split.missing_rows["user"],)


def test_raw_rows_are_encoded_later_as_the_job_encoded_them(folder, schema):
    ordered = FeatureSchema.model_validate({**dict(schema), "split": {"rule": "order", "val": 0.1, "test": 0.1}})
    dataset = preprocess([folder / "log.csv"], folder / "in-order", ordered)
    chunks = b"".join(read_chunks(find_files([folder / "log.csv"])[0], schema))
    frame = parse_chunk(chunks, schema).frame[2700:]
    vocabularies = {name: dataset.vocabulary(name) for name in ("city", "shop", "tags")}
    found = encode(frame, dataset.schema, dataset.manifest.dense, vocabularies)
    expected = pl.read_parquet(dataset.splits["test"].files[0].path).drop("spent")
    assert found.equals(expected)
    assert found.schema == expected.schema


@pytest.mark.parametrize("name", ["log.parquet", "log.orc", "log.jsonl", "log.ndjson.gz"])
def test_the_same_cells_in_another_format_give_the_same_parts(folder, schema, dataset, name):
    columns = {name: [row[name] for row in rows(3000)] for name in next(rows(1))}
    table = pa.table(
        {
            "note": pa.array(columns["note"]),
            "time": pl.Series(columns["time"]).str.to_datetime("%Y-%m-%d %H:%M:%S").to_arrow(),
            "spent": pa.array([float(x) for x in columns["spent"]]),
            "age": pa.array([int(x) if x else None for x in columns["age"]], pa.int32()),
            "price": pa.array([float(x) if x else None for x in columns["price"]]),
            "the city": pa.array([x or None for x in columns["the city"]]),
            "shop": pa.array([int(x) if x else None for x in columns["shop"]], pa.int64()),
            "tags": pa.array([x.split("|") if x else [] for x in columns["tags"]]),
            "user": pa.array([x or None for x in columns["user"]]),
        }
    )
    if name == "log.parquet":
        table = table.set_column(5, "the city", table["the city"].dictionary_encode())
        pq.write_table(table, folder / name, row_group_size=700)
    elif name == "log.orc":
        orc.write_table(table, folder / name, batch_size=100, stripe_size=1)
        assert orc.ORCFile(folder / name).nstripes > 1
    else:
        cells = [{key: cell for key, cell in row.items() if cell is not None} for row in table.to_pylist()]
        text = "".join(json.dumps(row, default=str) + "\n" for row in cells).encode()
        (folder / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    other = preprocess(
        [folder / name], folder / f"dataset of {name}", schema, PreprocessOptions(min_count=2), chunk_bytes=9000
    )
    assert other.manifest.splits == dataset.manifest.splits
    assert other.manifest.sparse == dataset.manifest.sparse


def test_random_split_takes_about_its_shares_and_another_seed_other_rows(folder, schema):
    split = {"rule": "random", "val": 0.25, "test": 0.0}
    plain = FeatureSchema.model_validate({**dict(schema), "split": split})
    found = [
        preprocess(
            [folder / "log.csv"],
            folder / f"random{seed}{size}",
            plain,
            PreprocessOptions(seed=seed),
            progress=False,
            chunk_bytes=size,
        )
        for seed, size in ((0, 5000), (1, None), (0, None))
    ]
    assert [data.splits["val"].rows for data in found] == pytest.approx([750] * 3, rel=0.1)
    assert found[0].splits["test"].rows == 0
    assert found[0].splits["test"].files == ()
    records = [data.manifest.splits for data in found]
    assert records[0] == records[2]
    assert records[0]["val"].files != records[1]["val"].files


def test_a_column_that_the_parquet_file_lacks_is_named(folder, schema, tmp_path):
    pq.write_table(pa.table({"spent": [1.0], "age": [1]}), tmp_path / "log.parquet")
    with pytest.raises(LogError, match="has no column time, price, the city"):
        preprocess([tmp_path / "log.parquet"], tmp_path / "dataset", schema)


CELL = st.text(st.sampled_from(list('ab ,"\n\r\té1')), max_size=6)


@settings(max_examples=120, deadline=None)
@given(cells=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=12), chunk_bytes=st.integers(48, 120), data=st.data())
def test_any_cut_of_a_quoted_file_gives_the_rows_that_pythons_csv_module_reads(
    tmp_path_factory, cells, chunk_bytes, data
):
    columns = [{"role": "label", "name": "y"}, {"role": "dense", "name": "x"}]
    columns += [{"role": "sparse", "name": name} for name in ("a", "b")]
    schema = FeatureSchema.model_validate({"name": "q", "separator": ",", "quote": '"', "columns": columns})
    path = tmp_path_factory.mktemp("quoted") / "log.csv"
    # Python leaves a carriage return without quotes, where it cannot be told from a Windows line end.
    has_return = any("\r" in cell for row in cells for cell in row)
    quoting = data.draw(st.sampled_from([csv.QUOTE_ALL] if has_return else [csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n", quoting=quoting).writerows([1, i, a, b] for i, (a, b) in enumerate(cells))
    (file,) = find_files([path])
    chunks = list(read_chunks(file, schema, chunk_bytes))
    assert b"".join(chunks) == path.read_bytes()
    assert [(c.start, c.end) for c in plan_chunks(file, schema, chunk_bytes)][-1][1] == path.stat().st_size
    parsed = [parse_chunk(chunk, schema) for chunk in chunks]
    assert sum(part.bad_rows.total for part in parsed) == 0
    found = pl.concat(part.frame for part in parsed)
    assert found["x"].to_list() == list(range(len(cells)))
    assert list(zip(found["a"], found["b"], strict=True)) == [(a or None, b or None) for a, b in cells]


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(
        st.sampled_from(
            [b'1,2,"a,b",c', b'0,1,a"b,c', b'1,1,"a"b,c', b"0,5,d,e", b'1,1,"x\ny",z', b'1,1,"a"\rb,c', b'1,1,"a"\r,c']
        ),
        min_size=1,
        max_size=9,
    )
)
def test_a_quote_out_of_place_spoils_its_own_row_alone(lines):
    columns = [{"role": "label", "name": "y"}, {"role": "dense", "name": "x"}]
    columns += [{"role": "sparse", "name": name} for name in ("a", "b")]
    schema = FeatureSchema.model_validate({"name": "q", "separator": ",", "quote": '"', "columns": columns})
    parsed = parse_chunk(b"".join(line + b"\n" for line in lines), schema)
    bad = [line for line in lines if line in (b'0,1,a"b,c', b'1,1,"a"b,c') or b"\r" in line]
    assert parsed.frame.height == len(lines) - len(bad)
    assert parsed.bad_rows.counts == ({"quotes": len(bad)} if bad else {})


def test_columns_in_another_order_and_more_of_them_give_the_same_parts(folder, dataset, dlrm, tmp_path):
    """Two files, each with its columns in an order of its own; the schema's ignored column is not there."""
    names = [name for name in next(rows(1)) if name != "note"]
    table = pl.DataFrame([{**row, "": "", "added upstream": "x,y"} for row in rows(3000)])
    table.head(1100).select(*reversed(names), "added upstream", "").write_csv(tmp_path / "a.csv")
    with gzip.open(tmp_path / "b.csv.gz", "wb") as file:
        table.tail(1900).select("added upstream", *sorted(names)).write_csv(file)
    options = ("--schema", folder / "schema.toml", "--min-count", "2", "--out", "out")
    done = dlrm("preprocess", "a.csv", "b.csv.gz", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stderr.split())
    assert told.count("columns that the schema does not name, not read: 'added upstream', ''") == 1
    other = Dataset.open(tmp_path / "out")
    assert other.manifest.splits == dataset.manifest.splits
    assert [source.rows for source in other.manifest.source] == [1100, 1900]
    assert [source.extra_columns for source in other.manifest.source] == [("added upstream", ""), ("added upstream",)]
    assert "extra_columns" not in dataset.manifest.to_json()
