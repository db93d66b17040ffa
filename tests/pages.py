"""Reads pages that were written."""

from html.parser import HTMLParser


class Tables(HTMLParser):
    """The tables of a page as rows of text, and which elements are open at the end."""

    VOID = ("meta",)

    def __init__(self):
        super().__init__()
        self.rows, self.cell, self.open = [], None, []

    def handle_starttag(self, tag, _):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        self.cell = "" if tag in {"td", "th"} else self.cell

    def handle_startendtag(self, tag, _):
        """`<line/>` opens nothing."""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in {"td", "th"}:
            self.rows[-1].append(self.cell)
            self.cell = None


def tables_of(page):
    tables = Tables()
    tables.feed(page)
    assert tables.open in ([], ["html"])
    return tables.rows
