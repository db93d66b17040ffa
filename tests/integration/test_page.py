"""The page of the real `dlrm serve` in a real browser: what it shows is what the server answers."""

import csv
import json
import re
import subprocess
from pathlib import Path

import httpx
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from helpers.pages import TOO_FAINT
from helpers.raw_logs import learnable_rows
from torchdlrm.features.schema import criteo_schema

FIELD_KEYS = ("placeholder", "title")
FEATURES = [column.name for column in (*criteo_schema().dense, *criteo_schema().sparse)]
KEY = "only-for-this-test"
WIDTH_OF_PHONE = 375


class Server:
    """A running `dlrm serve`, and a client beside the browser."""

    def __init__(self, running):
        self.url = running.url
        self.client = httpx.Client(base_url=running.url)

    def predict(self, rows):
        answer = self.client.post("/predict", json={"rows": rows})
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"]


@pytest.fixture(scope="module")
def server(serve, small_bundle):
    running = serve(small_bundle, "--log-level", "warning")
    server = Server(running)
    yield server
    server.client.close()
    running.stop()


@pytest.fixture
def open_page(browser, server):
    """Opens the page; when the test is over, nothing went elsewhere and the console is clean."""
    contexts, foreign, console = [], [], []

    def open_page(url=server.url, width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(40_000)
        page.on("request", lambda request: request.url.startswith(url) or foreign.append(request.url))
        page.on("console", lambda message: console.append(message.text))
        page.on("pageerror", lambda error: console.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [address for address in foreign if not address.startswith(("blob:", "data:"))] == []
    # The browser itself writes a line for every answer that is no success, and that is what some tests ask for.
    assert [text for text in console if not text.startswith("Failed to load resource")] == []


@pytest.fixture
def page(open_page):
    page = open_page()
    settled(page)
    return page


def settled(page):
    """Waits until the answer on the page is that of the row on the page."""
    page.wait_for_selector("#answer:not([aria-busy]) #probability data")


def edit(page, name, text):
    """Types into a field and waits for the answer to this edit, not to the one before."""
    with page.expect_response("**/explain"):
        page.fill(f"#field-{name}", text)
    page.wait_for_selector("#answer:not([aria-busy])")


def row_on(page):
    cells = {name: page.input_value(f"#field-{name}") for name in FEATURES}
    return {name: text for name, text in cells.items() if text}


def values(page, selector):
    return [float(text) for text in page.eval_on_selector_all(selector, "all => all.map((one) => one.value)")]


def test_an_edited_row_shows_what_predict_answers(page, server):
    before = values(page, "#probability data")
    assert before == pytest.approx(server.predict([row_on(page)]), abs=1e-6)
    edit(page, "int_0", "1234")
    edit(page, "cat_0", "")
    row = row_on(page)
    assert row["int_0"] == "1234"
    assert "cat_0" not in row
    after = values(page, "#probability data")
    assert after == pytest.approx(server.predict([row]), abs=1e-6)
    assert after != pytest.approx(before, abs=1e-6)
    assert re.fullmatch(r"\d+(\.\d+)? %", page.inner_text("#probability"))
    schema = server.client.get("/schema").json()
    assert page.inner_text("#model").split() == [schema["model"], schema["version"]]


def test_examples_and_clear_fill_every_field(page, server):
    schema = server.client.get("/schema").json()
    page.get_by_role("button", name="Example 2").click()
    settled(page)
    assert row_on(page) == {name: str(cell) for name, cell in schema["examples"][1].items() if cell is not None}
    marked = "all => all.map((input) => input.id.replace('field-', ''))"
    assert sorted(page.eval_on_selector_all("[data-unknown]", marked)) == sorted(schema["unknown"][1])
    assert page.is_visible("#examples-note")
    page.get_by_role("button", name="Clear").click()
    settled(page)
    assert row_on(page) == {}
    assert page.is_hidden("#why")
    assert values(page, "#probability data") == pytest.approx(server.predict([{}]), abs=1e-6)


def test_bars_are_what_each_column_adds_to_the_prediction(page, server):
    page.click("#all-contributions")
    shown = dict(
        zip(
            page.eval_on_selector_all("#contributions tbody th", "all => all.map((one) => one.textContent)"),
            values(page, "#contributions data"),
            strict=True,
        )
    )
    row = row_on(page)
    assert set(shown) == set(row)
    without = server.predict([{k: v for k, v in row.items() if k != name} for name in shown])
    whole = server.predict([row])[0]
    assert list(shown.values()) == pytest.approx([whole - part for part in without], abs=1e-6)
    assert list(map(abs, shown.values())) == sorted(map(abs, shown.values()), reverse=True)
    widths = page.eval_on_selector_all("#contributions i", "all => all.map((one) => one.getBoundingClientRect().width)")
    spread = max(0, *shown.values()) - min(0, *shown.values())
    room = page.eval_on_selector("#contributions .track", "one => one.getBoundingClientRect().width")
    assert widths == pytest.approx([max(1, abs(value) / spread * room) for value in shown.values()], abs=0.6)


@pytest.mark.parametrize("has_label", [True, False])
def test_a_pasted_line_fills_the_fields(page, server, has_label):
    line = learnable_rows(1, seed=7)[0]
    cells = dict(zip(FEATURES, line.split("\t")[1:], strict=True))
    page.click("summary")
    page.fill("#paste", line if has_label else line.split("\t", 1)[1])
    settled(page)
    assert row_on(page) == {name: text for name, text in cells.items() if text}
    assert values(page, "#probability data") == pytest.approx(server.predict([row_on(page)]), abs=1e-6)
    assert ("Its label says" in page.inner_text("#paste-note")) is has_label
    page.fill("#paste", "1\t2\t3")
    assert "3 cells" in page.inner_text("#paste-note")


def test_a_wrong_value_is_told_in_the_servers_words_and_its_field_marked(page, server):
    edit(page, "cat_3", "not hex")
    answer = server.client.post("/predict", json={"rows": [row_on(page)]})
    assert 400 <= answer.status_code < 500
    assert page.get_by_role("alert").inner_text() == answer.json()["error"]
    assert page.locator("[aria-invalid=true]").get_attribute("id") == "field-cat_3"
    assert page.locator("#probability data").count() == 0
    edit(page, "cat_3", "0a")
    settled(page)
    assert page.locator("[aria-invalid=true]").count() == 0
    assert page.get_by_role("alert").count() == 0


def rows_of(lines):
    cells = (dict(zip(FEATURES, line.split("\t")[1:], strict=True)) for line in lines)
    return [{name: text for name, text in row.items() if text} for row in cells]


def score_file(page, path):
    page.click("#tab-file")
    page.set_input_files("#file", path)
    page.wait_for_selector("#scores:not([hidden])")


def test_a_labelled_file_is_scored_and_judged(page, server, tmp_path):
    lines = learnable_rows(700, seed=3)  # more than the page sends at once
    path = tmp_path / "rows.tsv"
    path.write_text("\n".join(lines) + "\n")
    score_file(page, path)
    labels = [int(line.split("\t", 1)[0]) for line in lines]
    predictions = server.predict(rows_of(lines))
    area, loss = values(page, "#metrics data")
    assert area == pytest.approx(roc_auc_score(labels, predictions), abs=1e-6)
    assert loss == pytest.approx(log_loss(labels, predictions), abs=1e-6)
    assert f"{area:.4f}" in page.inner_text("#metrics")
    bins = page.eval_on_selector_all(
        "#calibration-table tbody tr", "all => all.map((one) => [one.cells[1].textContent, one.cells[2].textContent])"
    )
    assert [int(rows) for rows, _ in bins] == [70] * 10
    assert sum(int(clicks) for _, clicks in bins) == sum(labels)
    assert page.locator("#calibration-plot circle").count() == 10

    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "rows-scores.csv"
    with Path(download.value.path()).open(newline="") as file:
        scores = list(csv.DictReader(file))
    assert [float(row["prediction"]) for row in scores] == pytest.approx(predictions, abs=1e-6)
    assert [int(row["label"]) for row in scores] == labels
    assert [[row[name] for name in FEATURES] for row in scores] == [line.split("\t")[1:] for line in lines]

    page.click("#next")
    assert values(page, "#score-table data") == pytest.approx(predictions[50:100], abs=1e-6)


def test_a_dropped_file_with_a_header_and_no_labels_is_scored(page, server):
    lines = learnable_rows(20, seed=4)
    names = ["cat_5", "int_2", "colour"]
    body = "\n".join(
        [",".join(names), *(f"{row.get('cat_5', '')},{row.get('int_2', '')},red" for row in rows_of(lines))]
    )
    page.click("#tab-file")
    data = page.evaluate_handle(
        """(text) => {
            const data = new DataTransfer();
            data.items.add(new File([text], "dropped.csv"));
            return data;
        }""",
        body,
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})
    page.wait_for_selector("#scores:not([hidden])")
    assert "not used: colour" in page.inner_text("#file-note")
    assert page.is_hidden("#calibration")
    want = server.predict([{name: row[name] for name in names if name in row} for row in rows_of(lines)])
    assert values(page, "#score-table data") == pytest.approx(want, abs=1e-6)


def test_a_bad_line_of_a_file_is_named(page, tmp_path):
    lines = learnable_rows(600, seed=5)
    lines[550] = lines[550].rsplit("\t", 1)[0] + "\tnot hex"
    path = tmp_path / "bad.tsv"
    path.write_text("\n".join(lines) + "\n")
    page.click("#tab-file")
    page.set_input_files("#file", path)
    page.wait_for_selector("#file-error:not(:empty)")
    message = page.inner_text("#file-error")
    assert "line 551" in message
    assert "cat_25" in message
    assert page.is_hidden("#scores")


def test_a_full_server_is_asked_again(page, server, tmp_path):
    lines = learnable_rows(30, seed=6)
    path = tmp_path / "rows.tsv"
    path.write_text("\n".join(lines))
    refusals = [(503, "full"), (429, "too many")]

    def refuse_at_first(route):
        if refusals:
            status, reason = refusals.pop()
            route.fulfill(status=status, headers={"Retry-After": "0.1"}, json={"error": reason})
        else:
            route.continue_()

    page.route("**/predict", refuse_at_first)
    score_file(page, path)
    assert refusals == []
    assert values(page, "#score-table data") == pytest.approx(server.predict(rows_of(lines)), abs=1e-6)


def test_a_key_is_asked_for_and_kept_in_memory_alone(open_page, serve, small_bundle):
    locked = serve(small_bundle, "--log-level", "warning", DLRM_API_KEY=KEY)
    page = open_page(locked.url)
    page.wait_for_selector("#key-form:not([hidden])")
    assert page.is_hidden("#main")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.wait_for_selector("#connection-error:not(:empty)")
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    settled(page)
    assert page.is_hidden("#key-form")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.reload()
    page.wait_for_selector("#key-form:not([hidden])")
    locked.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_scrolls_sideways_on_a_phone_and_all_text_can_be_read(open_page, tmp_path, scheme):
    page = open_page(width=WIDTH_OF_PHONE, height=812, color_scheme=scheme)
    settled(page)
    path = tmp_path / "a-log-with-a-name-that-does-not-end-where-the-screen-of-a-phone-ends.tsv"
    path.write_text("\n".join(learnable_rows(80, seed=8)))
    for show in (lambda: None, lambda: page.click("summary"), lambda: score_file(page, path)):
        show()
        assert page.evaluate("document.documentElement.scrollWidth") == WIDTH_OF_PHONE
        assert page.evaluate(TOO_FAINT) == []


def test_the_keyboard_reaches_everything(page):
    page.focus("#tab-row")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-file"
    assert page.is_visible("#panel-file")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    page.focus("#tab-file")
    page.keyboard.press("ArrowLeft")
    assert page.is_visible("#panel-row")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    assert {f"field-{name}" for name in FEATURES} <= reached
    with page.expect_response("**/explain"):
        page.press("#field-int_0", "Enter")


def test_every_field_has_a_label(page):
    inputs = page.eval_on_selector_all("input, textarea", "all => all.map((one) => [one.id, one.labels.length])")
    assert len(inputs) >= len(FEATURES)
    assert [name for name, num_labels in inputs if num_labels == 0] == []


def test_the_request_can_be_copied_as_a_command(page, server):
    edit(page, "cat_0", "ffffffff")
    page.click("#copy-curl")
    command = page.input_value("#curl")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["predictions"] == pytest.approx(values(page, "#probability data"), abs=1e-6)
    assert server.url in command
    edit(page, "cat_0", "0a")
    assert page.is_hidden("#curl"), "it was of the row before"
    page.click("#api")
    assert json.loads(page.inner_text("body"))["openapi"].startswith("3.")


def test_another_label_than_a_click_is_called_by_its_name(open_page, server, tmp_path):
    page = open_page()
    schema = server.client.get("/schema").text.replace('"name":"label"', '"name":"liked"')
    page.route("**/schema", lambda route: route.fulfill(body=schema, content_type="application/json"))
    page.reload()
    settled(page)
    assert page.inner_text("#answer-title") == "Probability of “liked”"
    page.click("summary")
    page.fill("#paste", learnable_rows(1, seed=7)[0])
    assert "“liked”" in page.inner_text("#paste-note")
    path = tmp_path / "rows.tsv"
    path.write_text("\n".join(learnable_rows(80, seed=8)))
    score_file(page, path)
    assert "rate of “liked”" in page.inner_text("#metrics")
    assert "click" not in page.inner_text("body").lower()


def test_a_field_says_that_training_never_lacked_its_number(open_page, server):
    page = open_page()
    schema = server.client.get("/schema").json()
    next(column for column in schema["columns"] if column["name"] == "int_1")["never_missing"] = True
    page.route("**/schema", lambda route: route.fulfill(json=schema))
    page.reload()
    settled(page)
    shown = [(page.get_attribute(f"#field-{name}", key) or "") for name in ("int_0", "int_1") for key in FIELD_KEYS]
    assert shown == ["missing", "int", "the mean", "int, never missing in training: the mean stands for it"]


def test_a_vector_has_a_field_of_its_own_and_is_sent_as_a_list(open_page, server):
    page = open_page()
    settled(page)
    schema = server.client.get("/schema").json()
    next(column for column in schema["columns"] if column["name"] == "int_1").update(kind="vector", size=3)
    for example in schema["examples"]:
        example["int_1"] = [0.25, -1, 2]
    page.route("**/schema", lambda route: route.fulfill(json=schema))
    with page.expect_request("**/explain") as asked:
        page.reload()
    assert json.loads(asked.value.post_data)[0]["int_1"] == [0.25, -1, 2]
    assert page.input_value("#field-int_1") == "[0.25,-1,2]"
    assert page.inner_text(".vector label") == "int_1, 3 numbers"
    assert [text.split(maxsplit=1)[1] for text in page.locator("legend").all_inner_texts()] == [
        "12 numbers",
        "1 vector",
        "26 categories",
    ]
    with page.expect_request("**/explain") as asked:
        page.fill("#field-int_1", "[0.25, x]")
    assert json.loads(asked.value.post_data)[0]["int_1"] == "[0.25, x]", "what is wrong is for the server to say"
