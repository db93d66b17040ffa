"""`dlrm apply`: a bundle and a delta to it -> the bundle that the delta was made of."""

from pathlib import Path

from torchdlrm.cli.terminal import Json, print_json, progress_bars, say, say_next
from torchdlrm.folders import expect


def apply(bundle: Path, delta: Path, *, out: Path, as_json: Json = False) -> None:
    """Make a bundle of another one and a delta to it: the very bytes of the whole export.

    Args:
        bundle: The bundle that it is a delta to; it stays as it is.
        delta: Folder written by `dlrm export --delta-to`.
        out: Folder to write; nothing may be there.
        as_json: Print one JSON object on standard output.
    """
    expect("bundle", bundle)
    expect("delta", delta)
    from torchdlrm.bundle.apply import apply_delta
    from torchdlrm.cli.bundles import bundle_as_dict

    with progress_bars("") as progress:
        made = apply_delta(bundle, delta, out, progress=progress)
    say(f"applied {delta} to {bundle}: {out}, model {made.name}, version {made.version}, complete and undamaged")
    say_next("dlrm predict {0} ROWS, or dlrm serve {0}", out)
    if as_json:
        print_json(bundle_as_dict(made, None))
