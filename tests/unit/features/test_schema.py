"""What is wrong with a schema file is told in the words of the file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from torchdlrm.errors import SchemaError
from torchdlrm.features.schema import PRESETS, FeatureSchema
from torchdlrm.features.schema_file import _in_schema_file, load_schema, schema_toml

GOOD = """
name = "shop"
separator = ","
columns = [
    { role = "label", name = "click" },
    { role = "dense", name = "price", kind = "float", transform = "standardize" },
    { role = "sparse", name = "city", kind = "string" },
]
[split]
rule = "order"
"""


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ('name = "shop"', 'nam = "shop"', "nam: there is no such key; did you mean name?"),
        ('name = "shop"\n', "", "name: is missing"),
        ('"order"', '"ordr"', "split.rule: must be one of 'criteo', 'order', 'random', 'time', 'folder', not 'ordr'"),
        ("[split]", "[split]\nheader = true", "it stands below [split] and so belongs to it: move it above"),
        (
            'role = "dense"',
            'role = "densee"',
            "'label', 'dense', 'sparse', 'time', 'weight', 'ignore', not 'densee'; did you mean dense?",
        ),
        (
            'role = "dense", ',
            "",
            "column 2 (price): has no role; it is one of label, dense, sparse, time, weight, ignore",
        ),
        ("transform", "transfrom", "column 2 (price): transfrom: there is no such key of a dense column; did you mean"),
        (
            '"float"',
            '"flaot"',
            "column 2 (price): kind: must be one of 'int', 'float', 'vector', not 'flaot'; did you mean float?",
        ),
        (
            '"city"',
            '"the city"',
            "column 3 (the city): name: 'the city' is not made of letters, digits and _, no digit",
        ),
        ('"city"', '"the city"', 'write name = "the_city", header_name = "the city"'),
        ('"city"', '"price"', "columns 2 and 3 are both named 'price'"),
        ('"city"', '"city", max_values = 3', "column 3 (city): max_values needs value_separator"),
        ('"city"', '"city", num_embeddings = 3', "column 3 (city): num_embeddings is for kind id"),
        ('"city"', '"city", keep = "last"', "column 3 (city): keep needs max_values, the number of values"),
        (
            '"city"',
            '"city", table = "citi"',
            "column city: table = 'citi': there is no such sparse column; did you mean",
        ),
        ('"city"', '"city", table = "city"', "column city: table = 'city': shares a table itself; leave it out"),
        ('"city"', '"city", table = "price"', "column city: table = 'price': there is no such sparse column"),
        ('"city"', '"city", table = "x", min_count = 2', "column 3 (city): min_count is not for a column with table"),
        *(
            (
                "columns = [",
                f"""columns = [
                    {{ role = "sparse", name = "x"{owner} }},
                    {{ role = "sparse", name = "y", table = "x"{sharing} }},
                """,
                f"column y: table = 'x': {message}",
            )
            for owner, sharing, message in (
                (', kind = "int"', "", "has kind int, this one string; values of one table are of one kind"),
                (', table = "city"', "", "shares a table itself; write table = 'city'"),
                (
                    ', kind = "int", buckets = "log_square"',
                    ', kind = "int"',
                    "has buckets; a table is shared by columns whose",
                ),
                (
                    ", hash = 9",
                    ", hash = 8",
                    "has hash 9, this one 8; values of one table are of one hash",
                ),
                ("", ", hash = 8", "has hash None, this one 8"),
            )
        ),
        ('kind = "string"', 'kind = "id", hash = 3', "column 3 (city): hash is not for kind id"),
        ('"click"', '"click", threshold = "x"', "column 1 (click): threshold: must be a valid number, got 'x'"),
        ('"label"', '"ignore"', "at least one column must have the role 'label'"),
        (
            "columns = [",
            'columns = [ { role = "weight", name = "w" }, { role = "weight", name = "v" },',
            "at most one column has the role 'weight'",
        ),
        (
            'name = "shop"',
            'name = "shop"\nrun_label = "click"',
            "run_label: which label is learnt is said by train.label",
        ),
        ("columns = [", "columns = [ 3,", "column 1: must be a table { key = value, ... }, got 3"),
    ],
)
def test_a_mistake_in_a_schema_file_is_told_by_column_key_value_and_remedy(tmp_path, right, wrong, message):
    assert right in GOOD
    path = tmp_path / "my.toml"
    path.write_text(GOOD)
    load_schema(str(path))
    path.write_text(GOOD.replace(right, wrong, 1))
    with pytest.raises(SchemaError) as error:
        load_schema(str(path))
    told = str(error.value)
    assert f"{path}: the schema is wrong:" in told
    assert message in told
    assert "columns." not in told
    assert "nput should" not in told


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
COLUMN = {"role": "sparse", "name": "city", "kind": "string"}
KEYS = st.sampled_from(
    ["role", "name", "kind", "threshold", "value_separator", "max_values", "keep", "table", "hash", "x", ""]
)


@given(
    st.dictionaries(KEYS, VALUES, max_size=3), VALUES, st.dictionaries(st.sampled_from(["columns", "split"]), VALUES)
)
def test_every_mistake_has_words(of_column, other_column, of_schema):
    raw = {"name": "shop", "columns": [{**COLUMN, **of_column}, other_column], **of_schema}
    try:
        FeatureSchema.model_validate(raw)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            told = _in_schema_file(item, raw)
            assert "pydantic" not in told
            assert not told.startswith("columns.")


def test_the_old_name_of_max_embeddings_is_refused_in_a_schema_file_and_kept_in_a_dataset(tmp_path):
    path = tmp_path / "schema.toml"
    text = """
        name = "shop"
        columns = [{ role = "label", name = "y" }, { role = "sparse", name = "x", max_embeddings = 9 }]
    """
    path.write_text(text)
    schema = load_schema(path)
    assert schema.sparse[0].max_embeddings == 9
    written = schema.model_dump_json(by_alias=True, exclude_none=True)
    assert '"max_rows":9' in written
    assert FeatureSchema.model_validate_json(written) == schema
    path.write_text(text.replace("max_embeddings", "max_rows"))
    with pytest.raises(SchemaError, match=r"column 2 \(x\): max_rows: is called max_embeddings now"):
        load_schema(path)


@pytest.mark.parametrize("name", [*PRESETS, "shop"])
def test_a_schema_that_was_written_is_read_as_it_was(tmp_path, name):
    path = tmp_path / "schema.toml"
    path.write_text(GOOD)
    schema = load_schema(name if name in PRESETS else path)
    path.write_text(schema_toml(schema))
    assert load_schema(path) == schema


def test_a_column_that_shares_a_table_has_its_size_and_first_is_what_saying_nothing_means():
    columns = [
        {"role": "label", "name": "y"},
        {"role": "sparse", "name": "seen", "kind": "id", "value_separator": "|", "table": "item", "max_values": 2},
        {"role": "sparse", "name": "item", "kind": "id", "num_embeddings": 7},
        {"role": "sparse", "name": "shops", "value_separator": "|", "table": "shop", "keep": "first", "max_values": 2},
        {"role": "sparse", "name": "shop", "hash": 5},
    ]
    schema = FeatureSchema.model_validate({"name": "shared", "columns": columns})
    seen, _, shops, _ = schema.sparse
    assert (seen.num_embeddings, shops.hash, shops.keep) == (7, 5, None)
    assert [column.name for column in schema.sharing("item")] == ["item", "seen"]
    content = schema.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert "keep" not in content["columns"][3]
    assert FeatureSchema.model_validate(content) == schema
