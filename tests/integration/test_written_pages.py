"""The pages of datasets, runs, plans, live models and stories in a real browser: phone and desk, light and dark."""

import base64
import json
import shutil

import numpy as np
import pytest

from helpers.live_records import made_up
from helpers.pages import TOO_FAINT
from torchdlrm.config import load_config
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.page import dataset_page
from torchdlrm.evaluation.pictures import FOLDER, picture_of
from torchdlrm.evaluation.report import report_page as run_page
from torchdlrm.evaluation.report import runs_page
from torchdlrm.judged import Judged
from torchdlrm.live.report import report_page as live_page
from torchdlrm.planning.page import plan_page, sweep_page
from torchdlrm.planning.plan import PlanRequest, problem_of
from torchdlrm.planning.side_by_side import sweep
from torchdlrm.quickstart.story import Comparison, DayScore
from torchdlrm.sharding.solution import solve
from torchdlrm.sweeping.page import sweep_page as trials_page
from torchdlrm.sweeping.space import load_space
from torchdlrm.training.run import Run

PHONE, DESK = 390, 1280
NAMES = ["run", "runs", "dataset", "plan", "sweep", "trials", "live", "story"]


def begun_run(folder, small_dataset):
    """Ten intervals and one validation; a command and values that are long; evaluated, with its pictures; profiled."""
    run = Run(folder / "run", load_config("criteo-kaggle", {"train.epochs": "7"})).start(
        Dataset.open(small_dataset.path), world_size=2
    )
    run.close()
    environment = run.environment | {
        "started": "2026-03-04T05:06:07+00:00",
        "command": "dlrm train criteo-kaggle --run a-run-of-which-the-name/is-longer-than-a-phone/is-wide/as-some-are",
        "processor": "Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz, of which two cores are ours",
    }
    (run.path / "environment.json").write_text(json.dumps(environment))
    began_s = 1_772_600_767
    lines = [
        {"split": split, "step": step, "rows": 65_536 * step, "loss": 0.5 - 0.01 * step, "auc": 0.7 + 0.005 * step}
        | {"ne": 0.9, "rows_per_s": 123_456.0, "time": began_s + 19.2 * step}
        for split, steps in (("train", range(1, 11)), ("val", [10]))
        for step in steps
    ]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {"auc": 0.7654321, "logloss": 0.4512, "ne": 0.81, "calibration": 1.01, "accuracy": 0.79}
    intervals = {name: [value - 0.01234, value + 0.01234] for name, value in metrics.items()}
    about = {"split": "test", "step": 10, "checkpoint": "best", "rows": 20_000, **metrics, "intervals": intervals}
    run.write_evaluation("test", about)
    rng = np.random.default_rng(0)
    logits = rng.normal(-2.0, 1.2, 20_000).astype(np.float32)
    labels = (rng.random(20_000) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    run.write_evaluation(f"{FOLDER}/test", picture_of(Judged.of(labels, logits)))
    parts = {"matrix products": 2.5, "tables: look up": 0.8, "sending and waiting": 0.1}
    step = {"rank": 0, "num_steps": 5, "ms_per_step": 4.0, "ms_per_step_by_part": parts}
    run.profile.mkdir()
    (run.profile / "summary.json").write_text(json.dumps([step | {"communication_ms_per_step": 0, "hidden_share": 0}]))
    return run


def beside(run, name):
    """The same run with another rate, in another folder, and better."""
    folder = shutil.copytree(run.path, run.path.parent / name)
    other = Run.open(folder)
    (folder / "config.toml").write_text((folder / "config.toml").read_text().replace("seed = 0", "seed = 17", 1))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line | {"auc": line["auc"] + 0.01}) + "\n" for line in lines)
    )
    return Run.open(other.path)


def page_of_a_story():
    aucs = {"frozen": 0.7512, "live": 0.7654, "scratch": 0.7701}
    seconds = {"frozen": 1.0, "live": 19.0, "scratch": 50.0}
    scores = {
        name: [DayScore(auc + 0.001 * (day % 3 - 1), 0.45, seconds[name], 123_456) for day in range(9)]
        for name, auc in aucs.items()
    }
    return Comparison([f"day {day:02}" for day in range(9)], scores, [0.79] * 9).page("A model that learns every day")


def page_of_trials():
    """Forty trials of the example's space: pruned, failed and whole ones."""
    space = load_space("examples/criteo-small-space.toml", load_config("criteo-small"))
    rng = np.random.default_rng(0)

    def value_of(values):
        choices = getattr(values, "choices", None)
        return choices[rng.integers(len(choices))] if choices else float(rng.uniform(values.low, values.high))

    states = ["complete", "pruned", "complete", "failed: the loss is nan at step 3: " + "why and what to do " * 9]
    trials = [
        {"trial": number, "state": states[number % 4], "auc": None if number % 4 == 3 else 0.7 + 0.001 * number}
        | {"seconds": 3.0 + number, **{key: value_of(values) for key, values in space.values.items()}}
        for number in range(40)
    ]
    shares = dict(zip(space.values, (0.5, 0.3, 0.15, 0.05, 0.0), strict=True))
    repeated = {name: [0.74567, 0.74321, 0.7501] for name in ("start", "038", "036")}
    verdict = "too few rows to tell 038 from start: AUC +0.0012, from -0.0004 to +0.0028, p = 0.1312"
    result = {"verdict": verdict, "metric": "auc", "trials": trials, "best": 38}
    return trials_page("Sweep tried", space, result | {"importance": shares, "repeated": repeated})


@pytest.fixture(scope="module")
def pages(tmp_path_factory, small_dataset):
    """The file of each page by its name."""
    folder = tmp_path_factory.mktemp("pages")
    problem = problem_of(PlanRequest(tables="criteo-1tb"), load_config(None))
    run = begun_run(folder, small_dataset)
    written = {
        "run": run_page(run),
        "runs": runs_page([run, beside(run, "a-run-with-another-seed"), beside(run, "third")]),
        "dataset": dataset_page(small_dataset),
        "plan": plan_page(solve(problem)),
        "sweep": sweep_page(problem, sweep(problem, ("devices=1,2,8", "batch=8192,65536"))),
        "trials": page_of_trials(),
        "live": live_page("Live model ads", *made_up(30, failing=(5,)), 30),
        "story": page_of_a_story(),
    }
    for name, page in written.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in written}


@pytest.fixture
def show(browser, pages):
    contexts = []

    def show(name, width, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.goto(pages[name].as_uri())
        return page

    yield show
    for context in contexts:
        context.close()


# Elements that reach beyond the screen, but for those in a box that scrolls.
CUT = """() => [...document.querySelectorAll("body *")].filter((one) => !one.parentElement.closest(".scroll"))
    .filter((one) => one.getBoundingClientRect().right > innerWidth + 0.5)
    .map((one) => `${one.tagName}: ${one.textContent.trim().slice(0, 60)}`)"""

# Words, and numbers, of which a part stands in the next line; in tables, and in the command, all of them.
BROKEN = """() => {
    const broken = [], range = document.createRange();
    for (const one of document.querySelectorAll("td, th, .card, code span")) {
        const walker = document.createTreeWalker(one, NodeFilter.SHOW_TEXT);
        for (let node; (node = walker.nextNode()); ) {
            for (const word of node.data.matchAll(/\\S+/g)) {
                range.setStart(node, word.index);
                range.setEnd(node, word.index + word[0].length);
                const parts = [...range.getClientRects()], width = parts.reduce((sum, part) => sum + part.width, 0);
                if (parts.some((part) => part.top !== parts[0].top) && width < innerWidth - 40) broken.push(word[0]);
            }
        }
    }
    return broken;
}"""

# The text of charts: how large it is on the screen, which of it lies on other text, and which is outside of its chart.
CHART_TEXT = """() => {
    const sizes = [], overlaps = [], cut = [];
    for (const chart of document.querySelectorAll("svg")) {
        const scale = chart.getBoundingClientRect().width / chart.viewBox.baseVal.width;
        const texts = [...chart.querySelectorAll("text")].map((text) => [text, text.getBoundingClientRect()]);
        for (const [text, {left, right}] of texts) {
            sizes.push(parseFloat(getComputedStyle(text).fontSize) * scale);
            const box = chart.getBoundingClientRect();
            if (left < box.left - 0.5 || right > box.right + 0.5) cut.push(text.textContent);
        }
        texts.forEach(([a, p], i) => texts.slice(i + 1).forEach(([b, q]) => {
            const width = Math.min(p.right, q.right) - Math.max(p.left, q.left);
            const height = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
            if (width > 1 && height > 0.3 * p.height) overlaps.push(`${a.textContent} / ${b.textContent}`);
        }));
    }
    return {smallest: Math.min(...sizes), overlaps, cut};
}"""


# Charts that are not there, or do not say what they show and what their axes are.
UNNAMED = """() => [...document.querySelectorAll("svg")].filter((one) => {
    const figure = one.closest("figure"), size = one.getBoundingClientRect();
    const texts = [figure.querySelector("figcaption"), figure.querySelector(".axis.x")].map((text) => text.innerText);
    return size.width < 250 || size.height < 80 || texts.some((text) => text.trim().length < 3);
}).map((one) => one.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_cut_broken_or_too_small_to_read(show, name):
    page = show(name, DESK)
    # At a desk no table is wider than the page, and text can be read.
    assert page.evaluate(TOO_FAINT) == []
    hidden = "all => all.map((one) => one.scrollWidth - one.clientWidth)"
    assert max(page.eval_on_selector_all(".scroll", hidden)) <= 0
    for width in (DESK, 1000, 700, PHONE, 320):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(CUT) == []
        assert page.evaluate(BROKEN) == []
        assert page.evaluate(UNNAMED) == []
        text = page.evaluate(CHART_TEXT)
        assert text["smallest"] >= 10
        assert text["overlaps"] == []
        assert text["cut"] == []


# How dark the middle of the last four pixels of a picture's rows are, the average: 0 is black, 255 white.
EDGE = """async (png) => {
    const picture = await createImageBitmap(await (await fetch(`data:image/png;base64,${png}`)).blob());
    const canvas = new OffscreenCanvas(picture.width, picture.height), context = canvas.getContext("2d");
    context.drawImage(picture, 0, 0);
    const {data} = context.getImageData(picture.width - 4, 0, 2, picture.height);
    return data.filter((_, i) => i % 4 === 0).reduce((sum, value) => sum + value, 0) / (data.length / 4);
}"""


@pytest.mark.parametrize(("name", "part"), [("run", "table"), ("live", "table"), ("plan", "svg"), ("story", "svg")])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_goes_on_behind_the_edge_of_a_phone_has_a_shade_there(show, name, part, scheme):
    page = show(name, PHONE, scheme)
    boxes = page.query_selector_all(f".scroll:has({part})")
    box = next(box for box in boxes if box.evaluate("one => one.scrollWidth > one.clientWidth + 20"))

    def edge():
        return page.evaluate(EDGE, base64.b64encode(box.screenshot()).decode())

    page.add_style_tag(content=".scroll > * { visibility: hidden }")  # so that the edge alone is compared
    at_start = edge()
    box.evaluate("one => { one.scrollLeft = one.scrollWidth }")
    difference = edge() - at_start
    assert difference > 10 if scheme == "light" else difference < -10


@pytest.mark.parametrize("name", NAMES)
def test_in_the_dark_text_can_be_read_and_nothing_glares(show, name):
    page = show(name, DESK, "dark")
    assert page.evaluate(TOO_FAINT) == []
    channels = """all => all.map((one) => [one.tagName, getComputedStyle(one)])
        .flatMap(([tag, style]) => [tag === "I" ? style.backgroundColor : style.fill])
        .map((colour) => (colour.match(/[\\d.]+/g) ?? ["0"]).slice(0, 3).map(Number))"""
    fills = page.eval_on_selector_all("svg rect:not([fill=transparent]), .key i", channels)
    assert all(min(fill) < 0x90 for fill in fills), "no large part is nearly white"


def test_a_run_tells_when_it_began_how_long_it_took_and_by_which_command(show):
    page = show("run", DESK)
    text = page.inner_text("body")
    assert "2026-03-04 05:06" in text
    assert "3 min 12 s" in text
    assert page.inner_text("code").startswith("dlrm train criteo-kaggle --run a-run-of-which")
    assert "gpus" not in text, "there are none"
    marked = page.eval_on_selector_all("svg text.mark", "all => all.map((one) => one.textContent)")
    assert marked == ["val, once: 0.4", "val, once: 0.75", "val, once: 0.9"]


def test_a_story_begins_with_its_result(show):
    first = show("story", PHONE).inner_text("p >> nth=0")
    assert first == (
        "Live is 0.014 AUC above frozen and 0.005 AUC below scratch, at 38 % of the time of retraining from scratch."
    )
