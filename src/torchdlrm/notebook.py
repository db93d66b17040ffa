"""Shows an object in a notebook: a heading, facts about it, and a table, as HTML that needs no style sheet.

In: names and values.  Out: HTML for `_repr_html_`; every text is escaped.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def notebook_view(title: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """Make the HTML of an object.

    Args:
        title: what it is, such as `run run-2`.
        facts: shown in one line, in their order; without those that are None.
        rows: of a table, which have the columns of the first one.
    """
    named = ", ".join(f"{escape(name)} <b>{_text(value)}</b>" for name, value in facts.items() if value is not None)
    html = f"<div><strong>{escape(title)}</strong><br>{named}"
    if rows:
        head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
        body = "".join(
            "<tr>" + "".join(f"<td>{_text(row.get(name))}</td>" for name in rows[0]) + "</tr>" for row in rows
        )
        html += f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return html + "</div>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return escape(f"{value:,}" if isinstance(value, int) else str(value))
