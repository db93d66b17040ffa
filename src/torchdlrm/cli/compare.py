"""`dlrm compare`: models that have predicted the same rows -> how much better one is, and whether that is noise."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from torchdlrm.cli.options import Json, Judging, OwnModel, refuse_mistyped
from torchdlrm.cli.terminal import announce, print_json, print_slices, print_table, progress_bars, say


def compare(
    *candidates: str,
    metric: str | None = None,
    power: Annotated[float | None, Parameter(validator=Number(gt=0))] = None,
    judging: Judging = Judging(),  # noqa: B008 - frozen, and what the parser fills
    own_model: OwnModel = OwnModel(),  # noqa: B008 - likewise
    as_json: Json = False,
) -> None:
    """Compare models on the same rows with the first one: better, worse, no difference that matters, or too few rows.

    Each is a run, a bundle, the folder of a period of a live model (LIVE/days/3), or a file of predictions that
    `dlrm evaluate --predictions` or `dlrm predict` wrote. Several models of one recipe, trained with different seeds,
    are one candidate: name them by a pattern in quotes, such as `'runs/wide-*'`, or with a name, as in
    `wide='runs/wide-*'`. With one model each the verdict is about these models; with several it is about the recipes,
    and how much seeds scatter counts, too.

    Args:
        candidates: Two or more; the others are compared with the first one.
        metric: What the verdict is by, such as logloss; auc by default, and gauc needs --group.
        power: Say how many rows, or seeds, would show this difference of the metric 4 times in 5, as in 0.0005.
    """
    refuse_mistyped([Path(candidate) for candidate in candidates], "compare")
    announce(f"compare {', '.join(candidates)}")

    from torchdlrm.evaluation.compare import compare as compare_models
    from torchdlrm.metrics import BEST, METRICS

    with progress_bars("") as progress:
        how = vars(judging) | vars(own_model)
        found = compare_models(*candidates, metric=metric or BEST, progress=progress, **how)
    assert found is not None, "this process is the only one"
    needed = {} if power is None else found.power(power)
    droppable = ("value", f"of {next(iter(found.values))}", "rows ±", "seeds ±")
    print_table(found.about, found.table(), left_aligned=("candidate", "verdict"), droppable=droppable)
    say(f"{found.verdict}.")
    for name, parts in found.slices.items():
        print_slices([part.as_json() for part in parts], f"{name}, differences from {next(iter(found.values))}: ")
    for name, enough in needed.items():
        difference = f"a difference of {power:g} in {METRICS[found.metric].label}"
        say(f"{name}: {difference} would be seen, 4 times in 5, with {enough}")
    if as_json:
        shown = {name: {"rows": enough.rows, "seeds": enough.seeds} for name, enough in needed.items()}
        print_json(found.as_json() | ({} if power is None else {"power": {"difference": power, **shown}}))
