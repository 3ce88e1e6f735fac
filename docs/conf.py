"""The site of these pages: `make docs` reads README, CONTRIBUTING and docs/, a warning is an error.

The pages stay plain Markdown. What a site needs besides, the contents beside each page, is taken
from the lists of docs/index.md.
"""

from __future__ import annotations

import re
from typing import Any

project = "detkit"
html_title = "detkit"
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "docs/*.md"]
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_copy_source = False
html_show_sphinx = False
html_extra_path = ["site"]  # index.html, which leads to docs/index.html


def contents(markdown: str) -> str:
    """The page with what MyST shows beside every page: a toctree for each list of links."""

    def tree(section: re.Match[str]) -> str:
        heading, body = section.groups()
        pages = [
            link.removesuffix(".md") for link in re.findall(r"^- \[.*?\]\((.*?)\)", body, re.M)
        ]
        return f"{section[0]}\n```{{toctree}}\n:hidden:\n:caption: {heading}\n" + "\n".join(
            [*pages, "```", ""]
        )

    return re.sub(r"^## (.*)\n((?:(?!^## ).*\n)*)", tree, markdown, flags=re.M)


def setup(app: Any) -> None:
    """Sphinx calls this once."""

    def on_read(_: Any, name: str, source: list[str]) -> None:
        if name == root_doc:
            source[0] = contents(source[0])

    app.connect("source-read", on_read)
