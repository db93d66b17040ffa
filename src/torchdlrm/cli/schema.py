"""`dlrm schema`: propose a schema file for a log."""

import sys
from pathlib import Path

from torchdlrm.cli.terminal import Json, look_at, print_json, say, say_next
from torchdlrm.errors import UserError
from torchdlrm.logs.proposal.propose import SAMPLE_ROWS, propose_schema


def schema(
    log: Path,
    *,
    out: Path | None = None,
    rows: int = SAMPLE_ROWS,
    as_json: Json = False,
) -> None:
    """Propose a schema file for a log, from rows all over it, for you to edit.

    Args:
        log: A file of the log: CSV, TSV, JSON Lines, Parquet or ORC.
        out: Where to write the file; by default it is printed.
        rows: How many rows to read, about, from the beginning, the middle and the end.
        as_json: Print one JSON object: schema, text of the file, reasons, warnings, preset.
    """
    if rows < 1:
        msg = f"--rows: must be at least 1, got {rows}"
        raise UserError(msg)
    if out is not None and out.exists():
        msg = f"{out}: exists; choose another --out, or remove it first"
        raise UserError(msg)
    proposal = propose_schema(log, rows)
    look_at(proposal.warnings)
    if out is not None:
        try:
            out.write_text(proposal.text, encoding="utf-8")
        except OSError as error:
            msg = f"{out}: cannot be written: {error.strerror}"
            raise UserError(msg) from error
        say(f"wrote {out} from {proposal.origin}; read and edit it")
        say_next("dlrm preprocess {} --schema {} --out dataset", log, out)
    if as_json:
        print_json(
            {
                "log": str(log),
                "out": None if out is None else str(out),
                "preset": proposal.preset,
                "read": proposal.origin,
                "warnings": proposal.warnings,
                "reasons": proposal.reasons,
                "schema": proposal.schema,
                "text": proposal.text,
            }
        )
    elif out is None:
        sys.stdout.write(proposal.text)
