"""A page in a headless Chromium: what it says on its console and how it is laid out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--allow-file-access-from-files", "--enable-logging=stderr"),
)
_FRAME = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" style="border:0;width:WIDTHpx;height:800px" src="PAGE"></iframe>
<pre id="answer"></pre><script>
document.getElementById("frame").onload = () => {
  const frame = document.getElementById("frame").contentWindow, page = frame.document;
  const sections = {};
  for (const section of page.querySelectorAll("section")) {
    const box = section.getBoundingClientRect();
    sections[section.id] = section.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})
      && box.height > 40 && box.width > 200;
  }
  const inside = e => e.closest(".scroll, pre, nav ol, svg");
  const wide = [...page.body.querySelectorAll("*")].filter(
    e => !inside(e) && e.getBoundingClientRect().right > frame.innerWidth + 1);
  const texts = [...page.querySelectorAll("figure svg:not(.key) text")].filter(
    e => e.checkVisibility()).map(e => e.getBoundingClientRect().height);
  const images = [...page.images];
  document.getElementById("answer").textContent = JSON.stringify({
    width: frame.innerWidth, scrollWidth: page.documentElement.scrollWidth, sections,
    wide: wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
    smallestText: texts.length ? Math.min(...texts) : null,
    images: images.length, broken: images.filter(i => !(i.complete && i.naturalWidth)).length,
    requests: frame.performance.getEntriesByType("resource").map(e => e.name)
      .filter(name => !name.startsWith("data:"))});
};
</script>"""


def browser() -> str:
    """The Chromium on PATH; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(NAMES)} is on PATH: no browser to look at the page with")
    return found


def look(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """Layout of the page in a window of ``width`` pixels, and its ``console`` lines.

    Args:
        page: the file.
        width: in CSS pixels.
        folder: an empty one for the browser's own files.
    """
    frame = folder / "frame.html"
    text = _FRAME.replace("WIDTH", str(width)).replace("PAGE", page.resolve().as_uri())
    frame.write_text(text, encoding="utf-8")
    profile = f"--user-data-dir={folder / 'profile'}"
    wait = ("--virtual-time-budget=20000", "--window-size=1400,900", "--dump-dom")
    line = [browser(), *FLAGS, profile, *wait, frame.as_uri()]
    run = subprocess.run(line, capture_output=True, text=True, timeout=300, check=True)
    answer = re.search(r'<pre id="answer">(.*?)</pre>', run.stdout, re.DOTALL)
    assert answer and answer[1], f"the page did not load:\n{run.stderr[-2000:]}"
    console = [row for row in run.stderr.splitlines() if "CONSOLE" in row]
    return {**json.loads(html.unescape(answer[1])), "console": console}
