"""The pages: links, what is generated, what they quote, and the site that they build."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, anchors, links
from scripts import script

from detkit.config import recipe_path, recipes

DOCS = ROOT / "docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.is_file(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_contents_once() -> None:
    listed = [(DOCS / link).resolve() for link in links(DOCS / "index.md")]
    for page in PAGES:
        if page.name not in ("index.md", "README.md", "CONTRIBUTING.md"):
            assert listed.count(page) == 1, page.name


def test_pages_that_code_and_recipes_name_exist() -> None:
    for folder, pattern in (("detkit", "*.toml"), ("detkit", "*.py"), ("cli", "*.py")):
        for file in (ROOT / folder).rglob(pattern):
            for name in re.findall(r"docs/(\w+\.\w+)", file.read_text(encoding="utf-8")):
                assert (DOCS / name).is_file(), f"{file}: docs/{name}"


@pytest.mark.parametrize("name", ["cli", "settings", "recipes"])
def test_what_the_program_knows_is_up_to_date(name: str) -> None:
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    page = script("tools/reference_pages.py").page(name)
    assert text == page, "run `python tools/reference_pages.py`"


def test_every_recipe_and_setting_has_its_row() -> None:
    """Guards the generator: nothing may be lost by a header or a field that it cannot read."""
    from detkit.config import Config, to_plain

    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)) == set(recipes())
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    for section, values in to_plain(Config()).items():
        (table,) = re.findall(rf"## \[{section}\]\n(.*?)(?=\n## |\n<!--)", text, re.DOTALL)
        assert set(values) <= set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE))


def test_pictures_are_as_drawn() -> None:
    module = script("tools/draw_pictures.py")
    assert {p.stem for p in (DOCS / "pictures").glob("*.svg")} == set(module.PICTURES)
    for name, draw in module.PICTURES.items():
        text = (DOCS / f"pictures/{name}.svg").read_text(encoding="utf-8")
        assert text == draw().svg(), "run `python tools/draw_pictures.py`"
        assert "prefers-color-scheme:dark" in text and "http" not in text.replace(
            "http://www.w3.org/2000/svg", ""
        )


@pytest.mark.parametrize("method", ["detnet", "light_head", "pod"])
def test_published_scores_are_those_of_the_recipes(method: str) -> None:
    """Each number of a row is in the first paragraph of the row's recipe, or of its backbone's."""
    text = (DOCS / f"{method}.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"## What the paper reports\n(.*?)\n## ", text, re.DOTALL)
    rows = re.findall(r"^\| (.*) \| `([^`]+)` \|$", section, re.MULTILINE)
    assert len(rows) >= 9
    errors = {"24.1", "23.5", "23.0", "24.0"}  # of the backbones on ImageNet, in their own recipes
    for row, recipe in rows:
        header = recipe_path(recipe).read_text(encoding="utf-8").split("\n#\n")[0]
        numbers = re.findall(r"\b\d\d\.\d\b", row)
        assert numbers, row
        assert set(numbers) - errors <= set(re.findall(r"\d\d\.\d", header)), row


def test_the_site_builds_without_a_warning_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    for module in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; `pip install detkit[docs]`")
    line = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-c", "docs", "."]
    done = subprocess.run([*line, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        built = tmp_path / page.relative_to(ROOT).with_suffix(".html")
        assert built.is_file(), page
    for page in tmp_path.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe)[^>]*>", page.read_text("utf-8")):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), f"{page.name}: {tag}"
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text("utf-8"))
