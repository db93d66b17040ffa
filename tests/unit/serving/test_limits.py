"""What is too much is refused before work goes into it."""

import json
import time
import tracemalloc

import pytest

from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.prediction.json_rows import SharedRows
from torchdlrm.serving.front.bodies import parse_json
from torchdlrm.serving.front.open_inference.http import parse_infer
from torchdlrm.serving.front.open_inference.messages import CLASSES, check_num_fields
from torchdlrm.serving.front.rows import read_rows
from torchdlrm.serving.service.refusals import MAX_VALUES, RefusedRequest

SCHEMA = FeatureSchema(
    name="shop",
    columns=(
        LabelColumn(name="label"),
        DenseColumn(name="price"),
        SparseColumn(name="text", kind="string"),
        SparseColumn(name="tags", header_name="the tags", kind="string", value_separator=";"),
    ),
)
MAX_ROWS = 4096


def rows_of(body, schema, max_rows):
    return read_rows(json.dumps(body).encode(), schema, max_rows)[0]


def refused(status, function, *args):
    with pytest.raises(RefusedRequest) as error:
        function(*args)
    assert error.value.status == status
    assert len(error.value.message) < 300
    return error.value.message


def test_shared_cells_are_multiplied_by_no_candidates_before_these_are_counted_and_named():
    many = {"shared": {f"k{i}": 0 for i in range(3_000)}, "candidates": [{}] * (MAX_ROWS + 1)}
    assert "4,097 rows" in refused(413, rows_of, many, SCHEMA, MAX_ROWS)
    tracemalloc.start()
    try:
        many = {"shared": {f"k{i}": 0 for i in range(3_000)}, "candidates": [{}] * MAX_ROWS}
        assert "shared, column 'k0': the model has no such column" in refused(400, rows_of, many, SCHEMA, MAX_ROWS)
        long = {"shared": {"text": "x" * 60_000}, "candidates": [{}] * MAX_ROWS}
        assert "245,764,096 characters and values" in refused(413, rows_of, long, SCHEMA, MAX_ROWS)
        rows = rows_of({"shared": {"text": "x" * 4_000}, "candidates": [{}] * MAX_ROWS}, SCHEMA, MAX_ROWS)
        assert isinstance(rows, SharedRows)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_work_is_told_by_the_bytes_that_rows_would_have_without_shared_cells():
    plain = json.dumps([{"text": "x" * 100}] * 3).encode()
    assert read_rows(plain, SCHEMA, MAX_ROWS)[1] == len(plain)
    shared = json.dumps({"shared": {"text": "x" * 99}, "candidates": [{}] * 11}).encode()
    assert read_rows(shared, SCHEMA, MAX_ROWS)[1] == len(shared) + 10 * 100


@pytest.mark.parametrize(
    "body",
    [
        [{"tags": "a;" * 300} for _ in range(MAX_ROWS)],
        {"shared": {"tags": ["a"] * 400}, "candidates": [{}] * MAX_ROWS},
        {"shared": {"tags": "a;" * 400}, "candidates": [{}] * MAX_ROWS},
        [{"the tags": "a;" * 300} for _ in range(MAX_ROWS)],
        {"shared": {"the tags": "a;" * 400}, "candidates": [{}] * MAX_ROWS},
    ],
)
def test_the_values_of_all_lists_are_counted(body):
    assert "values in a request, and at most 524,288" in refused(413, rows_of, body, SCHEMA, MAX_ROWS)


@pytest.mark.parametrize("body", [{"x" * 1_000: 1}, {f"{i}" * 100: 1 for i in range(100)}, {}, 7, "x" * 1_000])
def test_what_is_no_request_is_told_shortly(body):
    with pytest.raises(RefusedRequest) as error:
        rows_of(body, SCHEMA, MAX_ROWS)
    assert len(error.value.message) < 1_000


@pytest.mark.parametrize("piece", [b"{},", b"[],", b"0,", b'"ab",', b"[[0],{}],"])
def test_json_of_too_many_values_is_refused_before_it_is_built(piece):
    body = b"[" + piece * ((4 << 20) // len(piece)) + b"{}]"
    started_s = time.process_time()
    assert "send several requests" in refused(413, parse_json, body, SCHEMA, MAX_ROWS)
    assert time.process_time() - started_s < 0.1


def test_as_many_rows_as_are_taken_are_never_too_many_values():
    wide = SCHEMA.with_columns([LabelColumn(name="label"), *(DenseColumn(name=f"d{i}") for i in range(300))])
    row = b"{" + b",".join(b'"d%d":1' % i for i in range(300)) + b"}"
    body = b"[" + b",".join([row] * MAX_ROWS) + b"]"
    assert len(read_rows(body, wide, MAX_ROWS)[0]) == MAX_ROWS
    assert MAX_VALUES < 300 * MAX_ROWS
    refused(413, parse_json, body, SCHEMA, MAX_ROWS)


INPUT = b'{"name": "price", "datatype": "INT64", "shape": [0], "data": []}'


@pytest.mark.parametrize(
    ("inputs", "status", "message"),
    [
        (b",".join([INPUT] * 50_000), 400, "50,000 tensors, and the model has 3 columns"),
        (INPUT.replace(b"[0]", b"[4097]"), 413, "4,097 rows"),
        (INPUT.replace(b"price", b"x" * 100_000), 400, "is no column of this model"),
        (INPUT.replace(b"INT64", b"x" * 100_000), 400, "datatype"),
        (INPUT.replace(b"[0]", b"[" + b"1," * 100_000 + b"1]"), 400, "shape"),
        (INPUT.replace(b"[0]", b"[" * 900 + b"]" * 900), 400, "shape"),
    ],
)
def test_tensors_are_looked_at_before_their_data(inputs, status, message, monkeypatch):
    monkeypatch.setattr("torchdlrm.serving.front.open_inference.http.from_json", None)  # would fail
    told = refused(status, parse_infer, b'{"inputs": [' + inputs + b"]}", None, SCHEMA, MAX_ROWS)
    assert message in told


def message(build):
    request = CLASSES["ModelInferRequest"]()
    build(request)
    return request.SerializeToString()


def many_inputs(request):
    for _ in range(5_000):
        request.inputs.add(name="x", datatype="INT64", shape=[0])


def many_parameters(request):
    for i in range(5_000):
        request.inputs.add().parameters[str(i)].bool_param = True


def many_outputs(request):
    for _ in range(5_000):
        request.outputs.add(name="x")


def within(number, data):
    """A field that holds other fields, or bytes."""
    size, digits = len(data), []
    while size:
        digits.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *digits[:-1], digits[-1] & 0x7F]) + data


@pytest.mark.parametrize(
    "build",
    [
        many_inputs,
        many_parameters,
        lambda request: request.inputs.add().contents.bytes_contents.extend([b""] * 20_000),
        lambda request: request.inputs.add().contents.int64_contents.extend([0] * 200_000),
        lambda request: request.inputs.add(shape=[0] * 20_000),
        lambda request: request.raw_input_contents.extend([b""] * 20_000),
        many_outputs,
        within(6, within(2, within(2, b"\x08\x01" * 20_000))),
        b"\x98\x06\x00" * 20_000,
    ],
)
def test_the_fields_of_a_message_are_counted_before_it_is_parsed(build):
    sent = build if isinstance(build, bytes) else message(build)
    assert "more than" in refused(413, check_num_fields, sent, 1_000, 10_000)
    check_num_fields(sent, 100_000, 100_000)


def test_large_data_are_few_fields_and_what_is_no_message_is_left_to_the_parser():
    def build(request):
        request.model_name = "x" * 100
        tensor = request.inputs.add(name="sparse", datatype="BYTES", shape=[MAX_ROWS, 26])
        tensor.parameters["a"].string_param = "b"
        request.raw_input_contents.append(b"\xff" * 1_000_000)

    sent = message(build)
    check_num_fields(sent, 10, 0)
    refused(413, check_num_fields, sent, 9, 0)
    for cut in range(1, 200):
        check_num_fields(sent[:cut], 10, 0)
    for junk in (b"\xff" * 1_000, b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x00" * 10, b"\x2b" * 10):
        check_num_fields(junk, 1_000, 0)
