"""`dlrm importance`: which features a model uses; `dlrm explain`: what moved a prediction; what tables hold."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from torchdlrm.cli.options import Json, NotNegative, OwnModel, Positive
from torchdlrm.cli.terminal import announce, print_json, print_table, progress_bars, say_facts, warn
from torchdlrm.errors import UserError
from torchdlrm.folders import expect, kind_of
from torchdlrm.units import show_number, show_p_value


def importance(
    source: Path,
    *,
    dataset: Path | None = None,
    split: str = "test",
    features: str = "*",
    groups: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    max_rows: Positive = 100_000,
    seed: NotNegative = 0,
    checkpoint: str = "best",
    label: str | None = None,
    own_model: OwnModel = OwnModel(),  # noqa: B008 - frozen, and what the parser fills
    as_json: Json = False,
) -> None:
    """Show which features a model uses: how much worse it predicts where one has the values of other rows.

    Of a run it is also written to RUN/evaluation/importance/, for `dlrm report`.

    Args:
        source: A bundle, or a run, which is exported to a temporary bundle in float32.
        dataset: Where the dataset is now, if it has moved since the training.
        split: train, val or test; several joined by + are taken together, as in val+test.
        features: Columns of the log to look at, each by itself, with commas between; * and ? as in names of files.
        groups: Columns to permute together, each group with a name, as in counts=int_* user=cat_1,cat_5.
        max_rows: Predict at most this many rows, drawn at random.
        seed: Draws the rows and the permutation.
        checkpoint: Of a run: best (the highest AUC of the val split; the last where nothing was validated), last, or a
            step.
        label: Which of several labels to judge by; by default the first.
    """
    expect("dataset", dataset)
    together = {name: names.split(",") for name, _, names in (group.partition("=") for group in groups or ())}
    if unnamed := [group for group in groups or () if "=" not in group]:
        raise UserError(f"`groups`: {unnamed[0]} has no name; give NAME=COLUMN,COLUMN, as in counts=int_*")
    announce(f"importance of the features of {source}")
    from torchdlrm.insight.importance import importance as permute
    from torchdlrm.metrics import BEST, LOSS, METRICS

    with progress_bars("") as progress:
        found = permute(
            source,
            dataset,
            split,
            features=features.split(","),
            groups=together,
            max_rows=max_rows,
            seed=seed,
            checkpoint=checkpoint,
            label=label,
            progress=progress,
            **vars(own_model),
        )
    if (kind := kind_of(source)) is not None and kind.name == "run":
        from torchdlrm.training.run import Run

        try:
            whose = f".{label}" if label and found.label else ""
            Run.open(source).write_evaluation(f"importance/{split}{whose}", found.as_json())
        except OSError as error:  # a run may lie where it can only be read
            warn(f"not kept in {source / 'evaluation'}: {error.strerror}")
    rows = []
    for name, changes in found.differences.items():
        loss, low, high = (f"{of:+.5f}" for of in (changes[LOSS].difference, *changes[LOSS].interval))
        cells = {
            "feature": name.removeprefix("without "),
            METRICS[LOSS].label: loss,
            "interval": f"{low} to {high}",
            METRICS[BEST].label: f"{changes[BEST].difference:+.5f}",
            "p": show_p_value(changes[LOSS].p_value_corrected),
        }
        rows.append(cells | {"used": "yes" if changes[LOSS].verdict == "worse" else "-"})
    where = f"{found.rows:,} rows of {split}{f', label {found.label}' if found.label else ''}"
    print_table(f"change where a feature has other rows' values: {where}, p by Holm", rows)
    if as_json:
        print_json({"source": str(source), "split": split, **found.as_json()})


def explain(
    bundle: Path,
    rows: Annotated[Path, Parameter(allow_leading_hyphen=True)],
    *,
    label: str | None = None,
    own_model: OwnModel = OwnModel(),  # noqa: B008 - likewise
    as_json: Json = False,
) -> None:
    """Show what each feature of a row adds to its logit: that of the row less that without the feature (leave-one-out).

    Args:
        bundle: Folder written by `dlrm export`.
        rows: File of JSON: a row, a list of rows, or a row a line; - is standard input.
        label: Which of the bundle's labels; by default the first.
    """
    expect("bundle", bundle)
    given = _rows_of_json(rows)
    from torchdlrm.prediction.explain import METHOD
    from torchdlrm.prediction.predictor import Predictor

    predictor = Predictor.open(bundle, **vars(own_model))
    found = predictor.explain(given, label)
    for number, one in enumerate(found):
        adds = {name: f"{by:+.4f}" for name, by in one.contributions.items()}
        whose = f" of {one.label}" if len(one.labels) > 1 else ""
        say_facts(f"row {number}: probability{whose} {one.prediction:.5f}, logit {one.logit:+.4f}; {METHOD}:", adds)
    if as_json:
        about = {"bundle": str(bundle), "version": predictor.version, "method": METHOD}
        print_json(about | {"explanations": [one.as_dict() for one in found]})


def show_tables(folder: Path, neighbours: Sequence[str], own_model: OwnModel, *, as_json: bool) -> None:
    """Print what each table of a bundle or a run holds, and the values nearest to some, as in cat_5=68fd1e64."""
    from torchdlrm.insight.importance import opened
    from torchdlrm.insight.tables import SEEN_FROM, nearest, table_uses

    with progress_bars("") as progress, opened(folder, progress=progress, **vars(own_model)) as (bundle, _):
        near = {pair: nearest(bundle, *pair.partition("=")[::2]) for pair in neighbours}
        tables = table_uses(bundle, progress)
    rows = [
        {
            "table": one["table"],
            "rows": f"{one['rows']:,}",
            "dim": str(one["dim"]),
            "seen": "-" if one["seen_rows"] is None else f"{one['seen_rows'] / max(1, one['rows'] - 1):.1%}",
            "rank": f"{one['effective_rank']:.1f}",
            **{f"norm {seen:,}+": show_number(one["norms"].get(seen, [None] * 2)[1], 4) for seen in SEEN_FROM},
        }
        for one in tables
    ]
    print_table("rows seen in training, effective rank, median norm of rows seen at least so often", rows)
    for pair, values in near.items():
        cosines = {value or "missing": f"{cosine:.3f}" for value, cosine in values.items()}
        say_facts(f"nearest to {pair}, by cosine:", cosines)
    if as_json:
        print_json({"path": str(folder), "tables": tables, "neighbours": near})


def _rows_of_json(path: Path) -> list[Any]:
    at, rows, is_stream = 0, list[Any](), path == Path("-")
    try:
        text = sys.stdin.read() if is_stream else path.read_text(encoding="utf-8")
        while at < len(text):
            if text[at].isspace():
                at += 1
                continue
            value, at = json.JSONDecoder().raw_decode(text, at)
            rows += value if isinstance(value, list) else [value]
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{'standard input' if is_stream else path}: {error}; it takes JSON: a row, a list of rows, or a row a line"
        ) from error
    return rows
