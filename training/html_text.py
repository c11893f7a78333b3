"""The readable text of a documentation page: paragraphs, headings, lists and code, nothing of the site around it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_BLOCK = re.compile(r"p|h[1-6]|li|dt|dd|pre|tr|table|ul|ol|dl|div|section|article|main|blockquote|br")
_SKIPPED = re.compile(r"script|style|nav|header|footer|head|button|svg|form|aside|summary")
# Class names and ids of what surrounds the text in the manuals' pages.
_SKIPPED_NAME = re.compile(
    r"headerlink|permalink|mark|sphinxsidebar|sidebar|related|nav(header|footer|-wrapper|-wide-wrapper)|toc|fancy_toc|"
    r"fancy_title_menu|menu-bar|nosearch|searchmenu|api_(metadata|stability)|out-of-band|src-links|column2|rightside|"
    r"rustdoc-toggle-hide|footer"
)
_VOID = re.compile(r"area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr")


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._open: list[str] = []
        self._skip_from: int | None = None  # depth of the element whose content is skipped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if _VOID.fullmatch(tag):
            if tag == "br":
                self.parts.append("\n")
            return
        self._open.append(tag)
        names = f"{dict(attrs).get('class') or ''} {dict(attrs).get('id') or ''}".split()
        skipped = _SKIPPED.fullmatch(tag) or any(map(_SKIPPED_NAME.fullmatch, names))
        if skipped and self._skip_from is None:
            self._skip_from = len(self._open)
        if _BLOCK.fullmatch(tag):
            self.parts.append("\n\n" if tag not in ("li", "tr", "dt", "dd") else "\n")
        if tag == "li" and self._skip_from is None:
            self.parts.append("- ")
        if tag in ("td", "th"):
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._open:
            return
        while self._open:
            closed = self._open.pop()
            if self._skip_from is not None and len(self._open) < self._skip_from:
                self._skip_from = None
            if closed == tag:
                break
        if _BLOCK.fullmatch(tag):
            self.parts.append("\n" if tag in ("li", "tr", "dt", "dd") else "\n\n")

    def handle_data(self, data: str) -> None:
        if self._skip_from is None:
            self.parts.append(data if "pre" in self._open else re.sub(r"\s+", " ", data))


def html_to_text(html: str) -> str:
    """Plain text of one page; blank lines between blocks, ``- `` before list items, code as it stands."""
    reader = _Reader()
    reader.feed(html)
    text = "".join(reader.parts).replace("¶", "").replace("\xa0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n- *\n+", "\n- ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
