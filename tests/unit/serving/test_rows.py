"""What `GET /schema` tells of a log that is not Criteo's."""

import orjson
import polars as pl
import pytest

from torchdlrm.errors import RowError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.prediction.json_rows import RowReader
from torchdlrm.serving.front.rows import describe, read_rows
from torchdlrm.serving.service.bundles import rows_as_logged
from torchdlrm.serving.service.refusals import RefusedRequest

SCHEMA = FeatureSchema.model_validate(
    {
        "name": "shop",
        "separator": ";",
        "quote": '"',
        "columns": [
            {"role": "time", "name": "when"},
            {"role": "dense", "name": "price"},
            {"role": "label", "name": "bought", "header_name": "Bought?", "threshold": 2.0},
            {"role": "sparse", "name": "user", "kind": "int"},
            {"role": "sparse", "name": "seen", "kind": "int", "value_separator": "|"},
        ],
    }
)
ROWS = pl.DataFrame(
    {"price": [1.5, None], "user": [2**53 + 1, -7], "seen": [[2**63 - 1, 3], None]},
    schema={"price": pl.Float64, "user": pl.Int64, "seen": pl.List(pl.Int64)},
)


@pytest.fixture(scope="module")
def described():
    examples = rows_as_logged(ROWS, SCHEMA), [["seen"], []]
    return orjson.loads(orjson.dumps(describe({"model": "shop", "version": "1"}, SCHEMA, examples, 100)))


def test_all_columns_stand_in_the_logs_order_with_what_reading_a_line_needs(described):
    assert [column["name"] for column in described["columns"]] == ["when", "price", "bought", "user", "seen"]
    assert described["columns"][2] == {"name": "bought", "role": "label", "header_name": "Bought?", "threshold": 2.0}
    assert described["columns"][4]["value_separator"] == "|"
    assert (described["separator"], described["quote"], described["max_rows"]) == (";", '"', 100)


def test_examples_survive_a_browser_which_knows_integers_up_to_2_53_alone(described):
    numbers = [
        *described["examples"][0].values(),
        *described["examples"][0]["seen"],
        *described["examples"][1].values(),
    ]
    assert all(abs(number) <= 2**53 for number in numbers if isinstance(number, int))
    assert RowReader(SCHEMA).read(described["examples"]).equals(ROWS)


CALLED = FeatureSchema.model_validate(
    {
        "name": "jobs",
        "columns": [
            {"role": "label", "name": "hired", "header_name": "hired?"},
            {"role": "dense", "name": "distance_km", "header_name": "distance km"},
            {"role": "sparse", "name": "user_id", "header_name": "user-ID", "kind": "int"},
        ],
    }
)


def rows_of(body):
    return RowReader(CALLED).read(read_rows(orjson.dumps(body), CALLED, 100)[0])


@pytest.mark.parametrize("shared", [{"distance_km": 5}, {"distance km": 5}])
@pytest.mark.parametrize("own", [{"user_id": 7}, {"user-ID": 7}])
def test_a_row_calls_a_column_by_its_name_or_its_header_name(shared, own):
    expected = RowReader(CALLED).read([{"distance_km": 5, "user_id": 7}] * 2)
    assert rows_of([{**shared, **own}, {"distance_km": 5, "user_id": 7}]).equals(expected)
    assert rows_of({"shared": shared, "candidates": [own, own]}).equals(expected)
    assert rows_of([{"hired?": 1}])["hired"].to_list() == [1]


BOTH = {"user_id": 7, "user-ID": 7}
BOTH_SAID = "column 'user_id': is also there as 'user-ID', its header_name; leave one out"


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ([{}, BOTH], f"row 1, {BOTH_SAID}"),
        ({"shared": BOTH, "candidates": [{}]}, f"shared, {BOTH_SAID}"),
        ({"shared": {}, "candidates": [BOTH]}, f"row 0, {BOTH_SAID}"),
        ({"shared": {"user_id": 7}, "candidates": [{}, {"user-ID": 7}]}, "row 1, column 'user_id': stands in 'shared'"),
        ({"shared": {"user-ID": 7}, "candidates": [{}, {"user_id": 7}]}, "row 1, column 'user_id': stands in 'shared'"),
        ({"shared": {"user-ID": 7}, "candidates": [{"user-ID": 7}]}, "row 0, column 'user_id': stands in 'shared'"),
        ([{"user-id": 7}], "row 0, column 'user-id': the model has no such column; it has distance_km, user_id"),
        ({"user-ID": 7}, "the body is one row, with the columns 'user-ID'"),
    ],
)
def test_a_row_has_a_column_once(body, fault):
    with pytest.raises((RowError, RefusedRequest)) as error:
        rows_of(body)
    assert fault in str(getattr(error.value, "message", error.value))
