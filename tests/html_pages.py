"""Checks that every page of a report must pass."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Reader(HTMLParser):
    """Tags, ids and addresses of a page; unclosed and stray tags."""

    VOID = {"meta", "link", "img", "br", "path", "use", "rect"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(str(value))
            if key in ("href", "src", "xlink:href"):
                self.addresses.append(str(value))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag


def checked(text: str) -> str:
    """The page: well-formed, nothing loaded from elsewhere, no script, one of each id, small."""
    page = Reader(text)
    assert not page.open
    assert len(set(page.ids)) == len(page.ids)
    assert "script" not in page.tags
    inside = {f"#{i}" for i in page.ids}
    assert all(a in inside or a.startswith("data:") for a in page.addresses)
    assert not re.search(r"url\((?!#)|@import", text)
    assert len(text.encode()) < 5_000_000
    return text
