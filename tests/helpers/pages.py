"""Reads pages that were written."""

from html.parser import HTMLParser

# Elements with text of their own whose contrast with what is behind them is below 4.5, as WCAG 2 level AA asks.
TOO_FAINT = """() => {
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const colour = (text) => text.match(/[\\d.]+/g).map(Number);
    const behind = (one) => {
        for (let at = one; at; at = at.parentElement) {
            const found = colour(getComputedStyle(at).backgroundColor);
            if (found.length === 3 || found[3] === 1) return found;
        }
        return [255, 255, 255];
    };
    const faint = [];
    for (const one of document.querySelectorAll("body *")) {
        const hasText = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!hasText || !one.checkVisibility() || one.disabled || one.closest("svg")) continue;
        const [a, b] = [light(colour(getComputedStyle(one).color)), light(behind(one))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(`${one.tagName}.${one.className}: ${one.textContent.trim()}`);
    }
    return faint;
}"""


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
