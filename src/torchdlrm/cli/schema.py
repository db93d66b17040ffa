"""`dlrm schema`: propose a schema file for a log."""

import sys
from pathlib import Path

from torchdlrm.cli.terminal import console
from torchdlrm.data.log.propose import propose_schema
from torchdlrm.errors import UserError


def schema(log: Path, *, out: Path | None = None) -> None:
    """Propose a schema file for a log, from its first rows, for you to edit.

    Args:
        log: A file of the log: CSV, TSV (plain or gzipped) or Parquet.
        out: Where to write the file; by default it is printed.
    """
    text = propose_schema(log)
    if out is None:
        sys.stdout.write(text)
        return
    if out.exists():
        msg = f"{out}: exists; choose another --out, or remove it first"
        raise UserError(msg)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        msg = f"{out}: cannot be written: {error.strerror}"
        raise UserError(msg) from error
    console.print(f"wrote {out}; edit it, then: dlrm preprocess {log} --schema {out} --out dataset", soft_wrap=True)
