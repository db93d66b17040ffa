"""Makes rows of the log of a shop, which has what Criteo's lack: a second label, content of items, or a history.

In: which rows.  Out: as of `rows.py`, and true logits without what the new input adds, which has one distribution
whatever else is in a row: so those rank rows as well as can be without it. All arithmetic on rows is on integers.

    click = intercept + position + user + item + latent[user] . latent[item]
          + 2 in place of the last, with a history, if an item in it is of the item's hidden category, of 2 of 96 items
    click = intercept + taste[group of the user] . content[item]; all items are new every 1,024 rows
    purchase, after a click = intercept + 3/4 (click - intercept) + user, another effect
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.synthetic.model import LOGIT_UNITS, NUM_LOGITS, click_thresholds, intercept
from torchdlrm.synthetic.rows import VALUE_SEPARATOR, Rows
from torchdlrm.synthetic.values import scatter

Extra = Literal["purchase", "content", "history"]
CONTENT_SIZE, MAX_HISTORY = 16, 20

_CLICK_RATE, _PURCHASE_RATE = 0.25, 0.03
_NUM_POSITIONS, _NUM_GROUPS, _NUM_CATEGORIES = 16, 8, 48
_ROWS_PER_SEASON, _ITEMS_PER_SEASON = 1 << 10, 64
_WORDS_PER_ROW = 12  # of 64 random bits

_Numbers = NDArray[np.int64]


class ShopGenerator:
    """Makes any part of the log, as `RowGenerator` does."""

    def __init__(self, seed: int, extras: Sequence[Extra]) -> None:
        rng = np.random.default_rng([seed, *b"shop"])

        def units(std: float, *shape: int) -> _Numbers:
            return np.rint(rng.normal(size=shape) * std * LOGIT_UNITS).astype(np.int64)

        self._extras, self._key = extras, int.from_bytes(rng.bytes(16), "little")
        # Users, and items, and what their pairs do: with a history little else is to be learnt.
        self._size, std = (2 * _NUM_CATEGORIES, 0.0) if "history" in extras else (1 << 10, 0.7)
        self._users, self._items, self._own = units(0.6, 3, self._size)
        self._positions, self._latents = units(0.3, _NUM_POSITIONS), units(std, 2, 2, self._size)
        tastes = rng.normal(size=CONTENT_SIZE) + 0.75 * rng.normal(size=(_NUM_GROUPS, CONTENT_SIZE))
        tastes *= 1.3 * LOGIT_UNITS / np.linalg.norm(tastes, axis=1, keepdims=True)
        self._tastes, self._thresholds = np.rint(tastes).astype(np.int64), click_thresholds()
        _, _, rest, added, own = self._draw(1 << 40, (1 << 40) + (1 << 16))
        self._intercept = intercept(rest + added, LOGIT_UNITS, _CLICK_RATE)
        clicks = self._thresholds[_points(rest + added + self._intercept)] / 2.0**32
        self._of_purchase = intercept((rest + added) * 3 // 4 + own, LOGIT_UNITS, _PURCHASE_RATE, clicks)

    def rows(self, start: int, end: int, **_: Any) -> Rows:
        """Rows of the log from `start` to before `end`, with their text."""
        columns, bits, rest, added, own = self._draw(start, end)
        points = _points(rest + added + self._intercept)
        labels = {"click": bits[0] < self._thresholds[points]}
        others = {f"without_{name}": 2 * _points(rest + self._intercept) + labels["click"] for name in self._extras}
        if others.pop("without_purchase", None) is not None:
            then = _points((rest + added) * 3 // 4 + own + self._of_purchase)
            of_click, of_purchase = (self._thresholds[at].astype(np.uint64) for at in (points, then))
            labels["purchase"] = labels["click"] & (bits[1] < of_purchase)
            of_both = np.searchsorted(self._thresholds, of_click * of_purchase >> np.uint64(32)).astype(np.int32)
            others["purchase"] = 2 * of_both + labels["purchase"]
        frame = pl.DataFrame({name: label.astype(np.int8) for name, label in labels.items()} | columns)
        lists = pl.selectors.array().arr.to_list()
        frame = frame.with_columns(lists.list.head(pl.col("length")) if "history" in columns else lists)
        texts = pl.selectors.list().cast(pl.List(pl.String)).list.join(VALUE_SEPARATOR)
        cells = frame.drop("length").with_columns(texts)
        text = cells.write_csv(separator="\t", include_header=start == 0, quote_style="never")
        return Rows(text.encode(), b"", 2 * points + labels["click"], others)

    def _draw(self, start: int, end: int) -> tuple[dict[str, NDArray[Any]], NDArray[Any], _Numbers, _Numbers, _Numbers]:
        """Columns of rows, bits of labels [2, B], the click's logits, what a new input adds, and for the purchase."""
        # A step of Philox's counter gives four words.
        generator = np.random.Philox(key=self._key, counter=start * _WORDS_PER_ROW // 4)
        words = generator.random_raw((end - start) * _WORDS_PER_ROW).reshape(-1, _WORDS_PER_ROW)
        drawn = words.view(np.uint16).astype(np.int64).T
        position, length = drawn[0] % _NUM_POSITIONS, drawn[3] * (MAX_HISTORY + 1) >> 16
        user, item = drawn[1:3] * self._size >> 16
        rest = self._positions[position] + self._users[user] + self._items[item]
        rest += (self._latents[0][:, user] * self._latents[1][:, item]).sum(axis=0) // LOGIT_UNITS
        added, columns = np.zeros_like(rest), {"position": position, "user": _hidden(user)}
        if "content" in self._extras:
            season = np.arange(start, end) // _ROWS_PER_SEASON
            item = season * _ITEMS_PER_SEASON + drawn[2] % _ITEMS_PER_SEASON
            bits = _hidden(_hidden(item))[:, None] >> np.arange(CONTENT_SIZE, dtype=np.uint32) & 1
            signs = 1 - 2 * bits.astype(np.int64)
            columns["content"] = signs / np.sqrt(CONTENT_SIZE)
            rest, added = np.zeros_like(rest), (self._tastes[user % _NUM_GROUPS] * signs).sum(axis=1)
        if "history" in self._extras:
            others, resembles = drawn[8 : 8 + MAX_HISTORY] * self._size >> 16, drawn[8 + MAX_HISTORY :] < 1 << 12
            others = np.where(resembles, item % _NUM_CATEGORIES + others % 2 * _NUM_CATEGORIES, others)
            columns["history"] = _hidden(others.T)
            is_similar = ((others - item) % _NUM_CATEGORIES == 0) & (np.arange(MAX_HISTORY)[:, None] < length)
            added = 2 * LOGIT_UNITS * is_similar.any(axis=0)
        columns |= {"item": _hidden(item), "length": length}
        return columns, words.view(np.uint32).T[2:4], rest, added, self._own[user]

    @property
    def schema(self) -> str:
        """The schema of the log, as a TOML file."""
        ids, history = 'role = "sparse", kind = "int"', f'table = "item", keep = "last", max_values = {MAX_HISTORY}'
        lines = {"click": 'role = "label"', "purchase": 'role = "label"', "position": 'role = "dense", kind = "int"'}
        lines |= {"user": ids, "content": f'role = "dense", kind = "vector", size = {CONTENT_SIZE}'}
        lines |= {"history": f'{ids}, {history}, value_separator = "{VALUE_SEPARATOR}"', "item": ids}
        given = {"click", "position", "user", "item", *self._extras}
        columns = [f'    {{ name = "{name}", {rest} }},\n' for name, rest in lines.items() if name in given]
        return "".join(['name = "shop"\nheader = true\ncolumns = [\n', *columns, "]\n"])


def _points(logits: _Numbers) -> NDArray[np.int32]:
    """Of logits in units of 1 / LOGIT_UNITS, their points of the grid of `click_thresholds`."""
    return np.clip(logits + NUM_LOGITS // 2, 0, NUM_LOGITS - 1).astype(np.int32)


def _hidden(numbers: NDArray[Any]) -> NDArray[np.uint32]:
    """Values that show nothing of their numbers."""
    return scatter(numbers.astype(np.uint32))
