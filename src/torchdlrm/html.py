"""Self-contained HTML pages: no scripts and nothing fetched, so that a page can be mailed, and prints."""

from collections.abc import Collection, Sequence
from html import escape

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#1c2430;max-width:1120px;margin:2em auto;padding:0 1em;background:#fff}
h1{font-size:1.45em;margin:0 0 .2em}h2{font-size:1.1em;margin:1.8em 0 .4em}p{margin:.4em 0}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin:1em 0}
.card{border:1px solid #d8dde4;border-radius:8px;padding:8px 16px}
.card b{display:block;font-size:1.35em;font-variant-numeric:tabular-nums}.card span{color:#5b6675;font-size:.86em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%;font-size:.88em}
th,td{padding:3px 9px;text-align:right;border-bottom:1px solid #e8ebef;white-space:nowrap}
th{color:#5b6675;font-weight:600}.l{text-align:left}.scroll{overflow-x:auto}
svg{width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:#5b6675}svg text.in{fill:#fff}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.86em;color:#5b6675}
.key i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px;vertical-align:-1px}
"""


def whole_page(title: str, body: Sequence[str]) -> str:
    """A page in the style of all our pages; the title and the body are HTML already."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>' + "\n".join(body) + "</html>\n"
    )


def figures_table(head: Sequence[str], rows: Sequence[Sequence[str]], left_aligned: Collection[str] = ()) -> str:
    """Rows of text as a table: the first column and `left_aligned` ones to the left, figures to the right."""
    left = [index == 0 or name in left_aligned for index, name in enumerate(head)]

    def cells(tag: str, row: Sequence[str]) -> str:
        aligned = zip(row, left, strict=False)
        return "".join(f"<{tag}{' class=l' if is_left else ''}>{escape(cell)}</{tag}>" for cell, is_left in aligned)

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells("th", head)}</tr>{lines}</table></div>'
