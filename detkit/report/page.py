"""A page of sections in one file: no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        key: its anchor.
        title: its heading.
        body: safe markup.
    """

    key: str
    title: str
    body: str


def render(title: str, subtitle: str, sections: Sequence[Section], footer: str) -> str:
    """The whole page; texts are escaped here, the sections' bodies are markup."""
    style = resources.files("detkit.report").joinpath("page.css").read_text(encoding="utf-8")
    links = "".join(f'<li><a href="#{s.key}">{escape(s.title)}</a></li>' for s in sections)
    bodies = "".join(
        f'<section id="{s.key}" aria-labelledby="{s.key}-title">'
        f'<h2 id="{s.key}-title"><a href="#{s.key}">{escape(s.title)}</a></h2>{s.body}</section>'
        for s in sections
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>"
        f'<nav aria-label="Contents"><ol>{links}</ol></nav><main>{bodies}</main>'
        f"<footer>{escape(footer)}</footer></body></html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """Escaped text as a paragraph, of class ``kind``."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def panels(figures: Sequence[str]) -> str:
    """Figures side by side, as many as the screen has room for."""
    return f'<div class="panels">{"".join(figures)}</div>' if figures else ""


def beside(parts: Sequence[str]) -> str:
    """Tables and figures of any width in a row, as far as the screen has room."""
    return f'<div class="beside">{"".join(parts)}</div>'


def details(summary: str, body: str) -> str:
    """Markup behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
