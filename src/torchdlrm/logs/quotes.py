"""Finds the bytes of a text that are in quoted cells.

In: text that starts with a row.  Out: a mask that distinguishes separators and line ends inside cells from real
ones, and the quotes that are out of place.

A quote opens a cell only at the cell's start; inside, two quotes stand for one.  Where no quote is out of place, the
parity of the quotes before a byte says whether it is inside, which costs little; elsewhere a regular expression walks
from cell to cell, so that a stray quote spoils its own row and not the rest of the text.
"""

import re
from functools import cache

import numpy as np
import numpy.typing as npt

_QUOTE, _LINE_END, _RETURN = ord('"'), ord("\n"), ord("\r")


def find_quoted(text: bytes, separator: str) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_] | None]:
    """Find the quoted cells of a text of N bytes.

    Returns:
        bool [N], true from the opening quote of a cell to just before its closing one (or to the end, where it is the
        last and is not closed); and bool [N], the quotes out of place, None where there are none.
    """
    codes = np.frombuffer(text, np.uint8)
    is_quote = codes == _QUOTE
    inside = np.bitwise_xor.accumulate(is_quote)
    is_edge = is_quote | (codes == ord(separator)) | (codes == _LINE_END)
    at_start = np.concatenate([[True], is_edge[:-1]])
    at_end = np.concatenate([is_edge[1:], [True]])
    if b"\r" in text:  # which ends a cell before a line end alone
        at_end[:-1] |= (codes[1:] == _RETURN) & np.concatenate([codes[2:] == _LINE_END, [True]])
    if not (is_quote & ~np.where(inside, at_start, at_end)).any():
        return inside, None
    spans = np.array([match.span() for match in _quoted_cell(separator).finditer(text)], np.int64).reshape(-1, 2)
    depth = np.zeros(len(codes) + 1, np.int8)
    np.add.at(depth, spans[:, 0], 1)
    np.add.at(depth, spans[:, 1] - 1, -1)
    inside = np.cumsum(depth[:-1], dtype=np.int8) > 0
    closing = spans[:, 1] - 1
    stray = is_quote & ~inside
    stray[closing] = ~at_end[closing]
    return inside, stray


def last_row_end(text: bytes, separator: str) -> int:
    """How many bytes of a text, which may end anywhere, are whole rows."""
    codes = np.frombuffer(text, np.uint8)
    inside, stray = find_quoted(text, separator)
    ends = np.flatnonzero((codes == _LINE_END) & ~inside)
    if stray is not None:
        # A cell may be opened here that is closed behind the end of this text: its row is not whole.
        starts_cell = np.concatenate([[True], (codes[:-1] == ord(separator)) | (codes[:-1] == _LINE_END)])
        unclosed = np.flatnonzero(stray & starts_cell & ~inside)
        closed = np.concatenate([[False], inside[:-1]])
        unclosed = unclosed[~closed[unclosed]]
        if len(unclosed):
            ends = ends[ends < unclosed[0]]
    return int(ends[-1]) + 1 if len(ends) else 0


@cache
def _quoted_cell(separator: str) -> re.Pattern[bytes]:
    start = rb"(?:\A|(?<=[\n" + re.escape(separator.encode()) + rb"]))"
    return re.compile(start + rb'"(?:[^"]++|"")*+"')
