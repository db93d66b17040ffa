"""`dlrm explain`: what moved a prediction."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from torchdlrm.cli.options import Json, OwnModel
from torchdlrm.cli.terminal import print_json, say_facts
from torchdlrm.errors import UserError
from torchdlrm.folders import expect


def explain(
    bundle: Path,
    rows: Annotated[Path, Parameter(allow_leading_hyphen=True)],
    *,
    own_model: OwnModel = OwnModel(),  # noqa: B008 - frozen, and what the parser fills
    as_json: Json = False,
) -> None:
    """Show what each feature of a row adds to its logit: that of the row less that without the feature (leave-one-out).

    Args:
        bundle: Folder written by `dlrm export`.
        rows: File of JSON: a row, a list of rows, or a row a line; - is standard input.
    """
    expect("bundle", bundle)
    given = _rows_of_json(rows)
    from torchdlrm.prediction.explain import METHOD
    from torchdlrm.prediction.predictor import Predictor

    predictor = Predictor.open(bundle, **vars(own_model))
    found = predictor.explain(given)
    for number, one in enumerate(found):
        adds = {name: f"{by:+.4f}" for name, by in one.contributions.items()}
        say_facts(f"row {number}: probability {one.prediction:.5f}, logit {one.logit:+.4f}; {METHOD}:", adds)
    if as_json:
        about = {"bundle": str(bundle), "version": predictor.version, "method": METHOD}
        print_json(about | {"explanations": [vars(one) for one in found]})


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
        msg = (
            f"{'standard input' if is_stream else path}: {error}; it takes JSON: a row, a list of rows, or a row a line"
        )
        raise UserError(msg) from error
    return rows
