"""The pictures of docs/concepts.md: boxes and arrows, drawn by hand in the units of website/drawing.py."""

from collections.abc import Callable

from website.drawing import Drawing


def data_flow() -> str:
    """From a raw log to predictions."""
    d = Drawing(506, "From a raw log to predictions: log, dataset, run, bundle, probabilities")
    left, wide = 108, 196
    middle = left + wide / 2
    y = d.box(left, 8, wide, ["raw log", "text, JSON Lines, Parquet, ORC"])
    d.arrow((middle, y), (middle, y + 46), label="dlrm preprocess")
    d.box(332, 24, 102, ["schema"])
    d.arrow((381, 55), (381, y + 26), (middle + 112, y + 26))
    top = y + 46
    y = d.box(left, top, wide, ["dataset", "ids and numbers in Parquet,", "vocabularies, transforms"], "mark")
    d.arrow((middle, y), (middle, y + 58), label="dlrm train")
    d.box(330, top + 14, 102, ["config"])
    d.arrow((381, top + 45), (381, y + 34), (middle + 74, y + 34))
    d.box(4, top + 14, 84, ["plan"])
    d.arrow((46, top + 45), (46, y + 34), (middle - 8, y + 34))
    run = y + 58
    y = d.box(left, run, wide, ["run", "config, plan, metrics,", "checkpoints"], "mark")
    d.box(338, run, 98, ["evaluation", "exact metrics,", "a report"])
    d.arrow((left + wide, run + 32), (338, run + 32))
    d.arrow((middle, y), (middle, y + 46), label="dlrm export")
    bundle = y + 46
    y = d.box(left, bundle, wide, ["bundle", "tables, arches, vocabularies,", "transforms, checksums"], "mark")
    d.arrow((left, top + 42), (96, top + 42), (96, bundle + 24), (left, bundle + 24))
    d.text(88, (run + bundle) / 2 + 26, "the same", "small", "end")
    d.text(88, (run + bundle) / 2 + 41, "vocabularies,", "small", "end")
    d.text(88, (run + bundle) / 2 + 56, "transforms", "small", "end")
    d.arrow((middle - 50, y), (middle - 50, y + 46), label="dlrm predict", anchor="end")
    d.arrow((middle + 50, y), (middle + 50, y + 46), label="dlrm serve")
    d.box(24, y + 46, 180, ["scores in a file", "a row for each row read"])
    d.box(220, y + 46, 200, ["probabilities", "over HTTP and gRPC"])
    return d.svg


def sharding() -> str:
    """Which rank holds what, and what a step sends."""
    d = Drawing(510, "Two ranks hold different tables and the same dense weights, and exchange what a step needs")
    for rank, x in enumerate((8, 242)):
        d.rectangle(x, 8, 190, 450, "frame")
        d.text(x + 95, 28, f"rank {rank}", "title", "middle")
        d.box(x + 10, 40, 170, [f"rows {'1 to B/2' if rank == 0 else 'B/2+1 to B'}", "of the batch: numbers, ids"])
    tables = ("table of users", "whole (table-wise)"), ("table of items", "whole (table-wise)")
    for (name, how), x in zip(tables, (18, 252), strict=True):
        d.box(x, 148, 170, [name, how], "mark")
    for half, x in zip(("rows 0 to n/2", "rows n/2 to n"), (18, 252), strict=True):
        d.box(x, 202, 170, ["a large table", f"{half} (row-wise)"], "mark")
    for x in (18, 252):
        d.box(x, 312, 170, ["dense, over arch", "a copy on each rank"])
        d.box(x, 404, 170, ["loss, gradients"])
        d.arrow((x + 85, 88), (x + 85, 148))
        d.arrow((x + 85, 250), (x + 85, 312))
        d.arrow((x + 85, 360), (x + 85, 404))
    for y, words in (
        (118, "ids to the ranks that hold them"),
        (281, "embeddings back to their rows"),
        (382, "mean of dense gradients"),
    ):
        d.arrow((186, y), (254, y))
        d.arrow((254, y), (186, y))
        d.text(220, y - 9, words, "small", "middle")
    d.text(220, 484, "then gradients of embeddings go to the ranks of their tables,", "small", "middle")
    d.text(220, 501, "where the optimizer updates the rows that the batch looked up", "small", "middle")
    return d.svg


def checkpoint() -> str:
    """How a checkpoint becomes complete, and who may load it."""
    d = Drawing(388, "Each rank writes its shards into a hidden folder, which is renamed when it is complete")
    for rank, x in enumerate((20, 170, 320)):
        d.box(x, 8, 100, [f"rank {rank}", "its shards"], "mark")
        d.arrow((x + 50, 56), (x + 50, 104))
    d.text(228, 84, "each writes its own", "small")
    y = d.box(
        20,
        104,
        400,
        [
            "checkpoints/.step-500/",
            "weights, state of the optimizers, place in the data",
            "sha256 of each file in checkpoint.json",
        ],
    )
    d.arrow((220, y), (220, y + 46), label="all is on the disk: renamed")
    y = d.box(20, y + 46, 400, ["checkpoints/step-500/", "complete, or not there at all"], "mark")
    d.arrow((110, y), (110, y + 52), label="checked, then loaded")
    d.arrow((330, y), (330, y + 52), label="checked")
    d.box(20, y + 52, 190, ["training resumes", "on any number of ranks,", "tables cut otherwise"])
    d.box(230, y + 52, 190, ["evaluate, export,", "warm start of another run"])
    return d.svg


def bundle() -> str:
    """What is in a bundle, and the way of a row through it."""
    d = Drawing(464, "The way of a raw row through a bundle, to a probability")
    d.box(120, 8, 200, ["a raw row", '{"age": 31, "city": "Paris"}'])
    d.rectangle(8, 78, 424, 312, "frame")
    d.text(18, 98, "bundle/", "title")
    d.arrow((170, 56), (110, 56), (110, 118))
    d.arrow((270, 56), (330, 56), (330, 118))
    d.box(20, 118, 180, ["transforms", "bundle.json: 31 → 3.47"], "mark")
    d.box(240, 118, 180, ["vocabulary", 'city.index: "Paris" → 17'], "mark")
    d.arrow((110, 166), (110, 274))
    d.arrow((330, 166), (330, 204))
    d.box(240, 204, 180, ["table", "row 17, float32 to int4,", "mapped, not read at once"], "mark")
    d.arrow((330, 269), (330, 290), (306, 290))
    d.box(20, 274, 286, ["dense arch, interaction, over arch", "weights.safetensors"], "mark")
    d.text(20, 352, "bundle.json has the SHA-256 of every byte; sample.parquet", "small")
    d.text(20, 370, "has rows with the predictions that they must give", "small")
    d.arrow((220, 390), (220, 424), label="log-odds, then probability")
    d.box(120, 424, 200, ["0.284"])
    return d.svg


def period() -> str:
    """A period of a live model."""
    d = Drawing(536, "A period of a live model: score, preprocess, learn, export, check, publish")
    steps = (
        ("log of the day", "raw rows with their labels"),
        ("score", "by the model of yesterday: the metrics"),
        ("preprocess", "old values keep their ids, new ones come"),
        ("learn", "from yesterday's weights; 5 % held back"),
        ("export", "a new bundle"),
        ("check", "the gate: rows that were held back"),
        ("publish", "current → bundles/0002, and a delta"),
    )
    left, wide = 20, 270
    middle = left + wide / 2
    y = 8.0
    tops = []
    for place, lines in enumerate(steps):
        tops.append(y)
        end = d.box(left, y, wide, lines, "mark" if place in {1, 5, 6} else "box")
        if place + 1 < len(steps):
            d.arrow((middle, end), (middle, end + 30))
        y = end + 30
    d.box(316, tops[1], 118, ["current", "of yesterday"])
    d.arrow((316, tops[1] + 24), (left + wide, tops[1] + 24))
    d.arrow((375, tops[1] + 48), (375, tops[3] + 24), (left + wide, tops[3] + 24))
    d.box(316, tops[5], 118, ["refused", "current stays"])
    d.arrow((left + wide, tops[5] + 24), (316, tops[5] + 24))
    d.box(316, tops[6], 118, ["server", "follows by itself"])
    d.arrow((left + wide, tops[6] + 24), (316, tops[6] + 24))
    return d.svg


DIAGRAMS: dict[str, Callable[[], str]] = {
    "data-flow": data_flow,
    "sharding": sharding,
    "checkpoint": checkpoint,
    "bundle": bundle,
    "period": period,
}
