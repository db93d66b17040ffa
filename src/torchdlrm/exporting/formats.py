"""Defines what else than a bundle an export can write, a record for each format: docs/other-formats.md.

No torch: the command line reads the records before it.
"""

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

from torchdlrm.errors import BundleError
from torchdlrm.files import replacing_durably
from torchdlrm.folders import KindName, expect
from torchdlrm.storage import mirror
from torchdlrm.storage.places import located

FormatName = Literal["bundle", "torchrec", "dlrm", "onnx", "triton"]


class ExportFormat(NamedTuple):
    """What a format is made of, what it is, and the `module:function` here that makes tensors, or writes a bundle."""

    source: KindName
    what: str
    maker: str


FORMATS: Mapping[FormatName, ExportFormat] = {
    "torchrec": ExportFormat("run", "a state dict of torchrec.models.dlrm", "weights:upstream_weights"),
    "dlrm": ExportFormat("run", "a state dict of dlrm_s_pytorch.py", "weights:upstream_weights"),
    "onnx": ExportFormat("bundle", "an ONNX graph", "onnx_file:write_onnx"),
    "triton": ExportFormat("bundle", "a model's folder for Triton's model repository", "onnx_file:write_triton"),
}


def export_as(
    source: str | Path,
    out: str | Path,
    format: FormatName,  # noqa: A002 - as the option is called
    *,
    checkpoint: str = "best",
    dataset: str | Path | None = None,
) -> None:
    """Write the weights of a run (`torchrec`, `dlrm`: for `torch.load`) or the model of a bundle (`onnx`, `triton`).

    Args:
        source: the run or the bundle.
        out: the file, or of `triton` a folder; nothing may be there.
        format: one of these.
        checkpoint: of a run: `best`, `last` or a step.
        dataset: of a run, where it has moved.

    Raises:
        UserError: there is no such source or checkpoint, something is at `out`, or the format has no such model.
    """
    source, out = located(source), located(out)
    expect(FORMATS[format].source, source)
    if os.path.lexists(mirror.fetch(out, ("",))):
        msg = f"`out`: {out} is there already; give another name, or remove it first"
        raise BundleError(msg)
    module, _, name = FORMATS[format].maker.partition(":")
    make = getattr(import_module(f"torchdlrm.exporting.{module}"), name)
    if FORMATS[format].source == "bundle":
        make(import_module("torchdlrm.bundle.bundle").Bundle.open(source), out)
        return
    run = import_module("torchdlrm.training.run").Run.open(source)
    with replacing_durably(out) as file:
        import_module("torch").save(make(run, run.open_dataset(dataset), checkpoint, format), file)
