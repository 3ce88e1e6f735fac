"""What the pages hold: links, headings, commands with the output shown below them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A line that a reader may type, and what the page shows as its output."""

    line: str
    shown: tuple[str, ...] = ()


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return [(m[1], m[2]) for m in _FENCE.finditer(text)]


def commands(page: Path) -> list[Command]:
    """Lines of `sh` blocks, and those behind a `$` of `console` blocks."""
    found: list[Command] = []
    for language, content in blocks(page.read_text(encoding="utf-8")):
        if language == "sh":
            lines = (re.sub(r"\s+#.*", "", line).strip() for line in content.splitlines())
            found += [Command(line) for line in lines if line and not line.startswith("#")]
        if language == "console":
            for part in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
                line, *shown = part.splitlines()
                found.append(Command(line, tuple(shown)))
    return found


def prose(page: Path) -> str:
    """The page without code."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^()\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """Headings as GitHub and MyST name them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}
