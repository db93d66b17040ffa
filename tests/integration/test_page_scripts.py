"""The page's modules on their own, in a real browser: text of a log -> JSON rows, and metrics beside scikit-learn."""

import json

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from torchdlrm.features.schema import criteo_schema

CRITEO = {"separator": "\t", "quote": None, "columns": [column.model_dump() for column in criteo_schema().columns]}
SHOP = {
    "separator": ",",
    "quote": '"',
    "columns": [
        {"name": "when", "role": "time", "kind": "int"},
        {"name": "price", "role": "dense", "kind": "float"},
        {"name": "bought", "role": "label", "header_name": "Bought?", "threshold": 2.0},
        {"name": "user", "role": "sparse", "kind": "int", "value_separator": None},
        {"name": "tags", "role": "sparse", "kind": "string", "value_separator": "|"},
    ],
}


@pytest.fixture(scope="module")
def page(browser, page_server):
    page = browser.new_page()
    page.goto(f"{page_server}/page/icon.svg")  # any document of the server: its policy holds here too
    yield page
    page.close()


@pytest.fixture(scope="module")
def read(page):
    """Reads a log's text as the page does: rows as the server would get them, labels, lines, what people are told."""

    def read(text, schema=CRITEO):
        return page.evaluate(
            """async ([text, schema]) => {
                const { parseLog, rowJson, featuresOf } = await import("/page/log.js");
                try {
                    const log = parseLog(text, schema);
                    const rows = log.rows.map((row) => rowJson(featuresOf(schema), row));
                    return { rows, labels: log.labels, lines: log.lines, description: log.description };
                } catch (error) {
                    return { error: error.message };
                }
            }""",
            [text, schema],
        )

    return read


def line(label=None, dense="7", sparse="0a1b2c3d"):
    return "\t".join([*([] if label is None else [label]), *[dense] * 13, *[sparse] * 26])


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        ({"positive": ["yes", "1"]}, {"yes": 1, "no": 0, "true": 1, "1.0": 1, "": None, "0": 0}),
        ({"positive": ["buy"], "negative": ["-1"], "null_values": ["NULL"]}, {"buy": 1, "-1.0": 0, "NULL": None}),
        ({"threshold": 4}, {"4": 1, "3.5": 0}),
        ({}, {"1.0": 1, "False": 0}),
    ],
)
def test_labels_mean_what_the_schema_says(read, keys, labels):
    schema = CRITEO | {"columns": [{**CRITEO["columns"][0], **keys}, *CRITEO["columns"][1:]]}
    assert read("".join(line(label) + "\n" for label in labels), schema)["labels"] == list(labels.values())


def test_lines_are_read_with_and_without_labels_and_headers(read):
    names = [column["name"] for column in CRITEO["columns"]]
    want = {name: 7 if name.startswith("int") else "0a1b2c3d" for name in names[1:]}
    for text, labels in [
        (line("1") + "\n" + line("0") + "\n", [1, 0]),
        (line("1") + "\r\n" + line("0"), [1, 0]),
        (line() + "\n" + line(), None),
        ("\ufeff" + "\n".join(["\t".join(names), line("1"), line("0")]), [1, 0]),
        ("\n".join([",".join(reversed(names)), *[",".join(reversed(line(x).split("\t"))) for x in "10"]]), [1, 0]),
    ]:
        got = read(text)
        assert "error" not in got, got
        assert [json.loads(row) for row in got["rows"]] == [want, want]
        assert got["labels"] == labels


def test_empty_cells_are_left_out_and_no_digit_is_lost(read):
    got = read(
        "\n".join(["user,price,tags", "9223372036854775807,,", "-5,1e-3,x|y|", ',0.1,"a ""b"", c|d"', "007,nan,"]), SHOP
    )
    assert got["rows"] == [
        '{"user":9223372036854775807}',
        '{"price":1e-3,"user":-5,"tags":["x","y"]}',
        '{"price":0.1,"tags":["a \\"b\\", c","d"]}',
        '{"price":"nan","user":"007"}',  # no JSON numbers: whether they are any is for the server to say
    ]


def test_a_vector_is_a_list_where_it_is_one(read):
    shop = SHOP | {"columns": [*SHOP["columns"], {"name": "text", "role": "dense", "kind": "vector", "size": 2}]}
    lists = ["[0.5, -1e-3]", "[0.5]", "[]", "0.5,1", "[0.5,,1]", "[[0.5,1]]", "[0.5,x]"]
    found = read("user,text\n" + "\n".join(f'1,"{text}"' for text in lists), shop)["rows"]
    cells = [json.loads(row)["text"] for row in found]
    assert cells == [[0.5, -1e-3], [0.5], *lists[2:]]


def test_a_logs_own_order_thresholds_and_quotes_are_kept(read):
    got = read('5,1.5,3,17,"a|b"\n\n6,2.5,1,18,"two\nlines"\n7,2.5,,18,c\n', SHOP)
    assert [json.loads(row)["user"] for row in got["rows"]] == [17, 18, 18]
    assert got["labels"] == [1, 0, None]
    assert got["lines"] == [1, 3, 5]
    assert "3 rows" in got["description"]
    assert "labels in 2 rows" in got["description"]


@pytest.mark.parametrize(
    ("text", "schema", "message"),
    [
        ("a\tb\tc\n", CRITEO, "The first line has 3 cells between tabs. A line of this model's log has 40, or 39"),
        (line("1") + "\n" + "1\t2\n", CRITEO, "Line 2 has 2 cells; the first has 40."),
        (line("yes") + "\n", CRITEO, 'Line 1: the label "yes" means neither 0 nor 1.'),
        ('user,price,tags\n1,2,"never closed\n', SHOP, "Line 2: a quoted cell is not closed."),
        ("  \n", CRITEO, "There is nothing in the first line."),
    ],
)
def test_what_is_no_log_is_refused_with_its_line(read, text, schema, message):
    assert message in read(text, schema)["error"]


def test_of_several_labels_the_first_one_is_read_wherever_it_stands(read):
    columns = [{"name": "seen", "role": "label"}, *SHOP["columns"], {"name": "kept", "role": "label"}]
    shop = SHOP | {"columns": columns, "labels": ["bought", "seen"]}
    got = read("seen,kept,user,bought,price\n1,1,2,3,4\n0,1,2,1,4\n", shop)
    assert got["labels"] == [1, 0]
    assert "not used: seen, kept" in got["description"]


def test_unknown_columns_of_a_header_are_told(read):
    assert "not used: when, colour" in read("when,user,colour,price\n1,2,red,3\n", SHOP)["description"]


def test_metrics_equal_scikit_learn(page, seed):
    rng = np.random.default_rng(seed)
    for num_rows, digits in [(1_000, 2), (997, 7), (23, 1)]:  # few digits: many ties
        predictions = np.round(rng.beta(1, 3, num_rows), digits)
        labels = (rng.random(num_rows) < predictions).astype(int)
        auc, logloss = page.evaluate(
            """async ([labels, predictions]) => {
                const { auc, logloss } = await import("/page/metrics.js");
                return [auc(labels, predictions), logloss(labels, predictions)];
            }""",
            [labels.tolist(), predictions.tolist()],
        )
        assert auc == pytest.approx(roc_auc_score(labels, predictions), abs=1e-12)
        assert logloss == pytest.approx(log_loss(labels, predictions), rel=1e-9)


def test_calibration_bins_hold_every_row_once_by_rising_prediction(page, seed):
    rng = np.random.default_rng(seed)
    predictions = rng.beta(1, 3, 1_003)
    labels = (rng.random(1_003) < predictions).astype(int)
    bins = page.evaluate(
        """async ([labels, predictions]) =>
            (await import("/page/metrics.js")).calibrationBins(labels, predictions)""",
        [labels.tolist(), predictions.tolist()],
    )
    order = np.argsort(predictions)
    for got, members in zip(bins, np.split(order, [i * 1_003 // 10 for i in range(1, 10)]), strict=True):
        assert (got["rows"], got["clicks"]) == (members.size, labels[members].sum())
        assert got["predicted"] == pytest.approx(predictions[members].mean())
        assert got["low"] < got["observed"] < got["high"]


def test_one_class_has_no_auc(page):
    script = """async () => Number.isNaN((await import("/page/metrics.js")).auc([0, 0, 0], [0.1, 0.2, 0.3]))"""
    assert page.evaluate(script) is True


def test_the_head_has_the_period_of_a_model_that_has_one(page):
    script = """async ([period]) => {
        const { modelLine } = await import("/page/row.js");
        return modelLine("clicks", "b5da23fd", period).map((one) => one.textContent);
    }"""
    assert page.evaluate(script, [0]) == ["clicks", "b5da23fd", "period 0"]
    assert page.evaluate(script, []) == ["clicks", "b5da23fd"]
