"""What each feature adds to a prediction, beside predictions of rows that were edited by hand."""

import json

import httpx
import polars as pl
import pytest

from torchdlrm.errors import RowError
from torchdlrm.prediction.predictor import Predictor

ROWS = [
    {"int_0": 7, "int_1": "", "cat_0": "00000001", "cat_1": "00000002", "cat_2": "00000002", "cat_5": None},
    {"cat_0": "00000003", "cat_25": "ffffffff"},
    {},
]


@pytest.fixture(scope="module")
def predictor(small_bundle):
    return Predictor.open(small_bundle)


@pytest.fixture(scope="module")
def server(serve, small_bundle, tmp_path_factory):
    log = tmp_path_factory.mktemp("predictions")
    running = serve(small_bundle, "--log-level", "warning", "--max-rows-per-request", "30", "--log-predictions", log)
    with httpx.Client(base_url=running.url) as client:
        yield client
    running.stop()
    assert pl.scan_parquet(log / "*.parquet").select("request_row").collect().height == 1, "the explained are not in it"


def by_hand(predictor, row):
    """The logit of a row less that of the same row without each of its cells."""
    there = [name for name, cell in row.items() if cell not in (None, "")]
    rows = [row, *({key: cell for key, cell in row.items() if key != name} for name in there)]
    whole, *without = predictor.predict_encoded(predictor.encode_rows(rows)).logits.tolist()
    return {name: whole - one for name, one in zip(there, without, strict=True)}


def test_contributions_are_the_differences_of_predictions_of_edited_rows(predictor):
    found = predictor.explain(ROWS)
    assert [one.prediction for one in found] == pytest.approx(predictor.predict(ROWS).tolist(), abs=1e-7)
    for row, one in zip(ROWS, found, strict=True):
        assert one.contributions == pytest.approx(by_hand(predictor, row), abs=1e-5)
        sizes = [abs(adds) for adds in one.contributions.values()]
        assert sizes == sorted(sizes, reverse=True)
    assert max(map(abs, found[0].contributions.values())) > 0.1


def test_a_frame_is_explained_as_the_rows_that_it_is(predictor):
    frame, _ = predictor.bundle.sample()
    frame = frame.head(20)
    rows = [{name: cell for name, cell in row.items() if cell is not None} for row in frame.to_dicts()]
    rows = [{name: f"{cell:08x}" if name.startswith("cat") else cell for name, cell in row.items()} for row in rows]
    for one, other in zip(predictor.explain(frame), predictor.explain(rows), strict=True):
        assert one.contributions == pytest.approx(other.contributions, abs=1e-5)


def test_a_row_that_cannot_be_read_is_named_by_its_number(predictor):
    with pytest.raises(RowError, match="row 1, column 'cat_0'"):
        predictor.explain([*ROWS[:1], {"cat_0": "no hex"}])
    with pytest.raises(RowError, match="row 0: expected the row's cells"):
        predictor.explain([7])


@pytest.mark.parametrize(
    "text",
    [json.dumps(ROWS[0], indent=2), json.dumps(ROWS), "\n".join(map(json.dumps, ROWS)) + "\n\n"],
    ids=["a row", "a list", "lines"],
)
def test_the_command_explains_rows_of_a_file(dlrm, predictor, small_bundle, tmp_path, text):
    path = tmp_path / "row.json"
    path.write_text(text)
    done = dlrm("explain", small_bundle, path, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["method"], told["version"]) == ("leave-one-out", predictor.version)
    for row, one in zip(ROWS, told["explanations"], strict=False):
        assert one["contributions"] == pytest.approx(by_hand(predictor, row), abs=1e-5)
    assert "leave-one-out" in done.stderr


def test_a_file_that_is_no_json_is_one_error_with_its_line(dlrm, small_bundle, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"cat_0": "1"}\n{"cat_0": oops}\n')
    done = dlrm("explain", small_bundle, path)
    assert done.returncode == 2
    assert "line 2 column 11" in done.stderr
    assert dlrm("explain", small_bundle, tmp_path / "none.json").returncode == 2


def test_the_server_explains_as_the_predictor_and_keeps_its_limits(server, predictor):
    answer = server.post("/explain", json=ROWS[:2]).json()
    assert (answer["method"], answer["version"]) == ("leave-one-out", predictor.version)
    for row, one in zip(ROWS, answer["explanations"], strict=False):
        assert one["contributions"] == pytest.approx(by_hand(predictor, row), abs=1e-5)
    whole = dict.fromkeys([f"int_{i}" for i in range(13)] + [f"cat_{i}" for i in range(26)], "1")
    only = server.post("/explain", json=[whole]).json()["explanations"][0]
    assert len(only["contributions"]) == 39, "one row is taken, though it needs 40 predictions and 30 are made at once"
    shared = {"shared": {"cat_0": "00000001"}, "candidates": [{"cat_1": "00000002"}, {}]}
    assert [len(one["contributions"]) for one in server.post("/explain", json=shared).json()["explanations"]] == [2, 1]
    assert server.post("/explain", json=[]).json()["explanations"] == []
    refused = server.post("/explain", json=[whole, {}])
    assert refused.status_code == 413
    assert "take 41 predictions" in refused.json()["error"]
    wrong = server.post("/explain", json=[{}, {"cat_3": "no hex"}])
    assert (wrong.status_code, "row 1, column 'cat_3'" in wrong.json()["error"]) == (400, True)
    assert server.post("/predict", json=[{}]).status_code == 200
    rows = next(line for line in server.get("/metrics").text.splitlines() if line.startswith("dlrm_rows_total "))
    assert float(rows.split()[1]) == 1, "rows that only explain are not counted as predicted"
