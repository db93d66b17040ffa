"""What `GET /schema` tells of a log that is not Criteo's."""

import orjson
import polars as pl
import pytest

from torchdlrm.features.schema import FeatureSchema
from torchdlrm.prediction.json_rows import RowReader
from torchdlrm.serving.front.rows import describe
from torchdlrm.serving.service.bundles import rows_as_logged

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
