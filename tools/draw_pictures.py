"""Draws the idea of each method anew, docs/pictures/*.svg: `python tools/draw_pictures.py`.

Strides, channels, dilations and genes come from the program. The pictures have a ground of their
own in light and in dark mode, so they can be read on any page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import product
from pathlib import Path

import torch
from torch import nn

from detkit import config as configs
from detkit import scales
from detkit.models import build_backbone
from detkit.models.search_space import ARCHITECTURES, SPACES

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pictures"
WIDTH = 760

_STYLE = """
.ground{fill:#ffffff}.ink{fill:#1f2328}.soft{fill:#57606a}.line{stroke:#8c959f;fill:none}
.cell{fill:#f6f8fa;stroke:#afb8c1}.blue{fill:#cfe8ff;stroke:#0969da}.orange{fill:#ffe2c7;stroke:#bc4c00}
.dot{fill:#0969da}.dot2{fill:#bc4c00}.tip{fill:#8c959f}.path{stroke:#bc4c00;fill:none}
text{font-family:system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;font-size:13px}
.big{font-size:15px;font-weight:600}.small{font-size:12px}
@media (prefers-color-scheme:dark){
.ground{fill:#0d1117}.ink{fill:#e6edf3}.soft{fill:#9da7b1}.line{stroke:#6e7681}
.cell{fill:#161b22;stroke:#484f58}.blue{fill:#10335c;stroke:#4493f8}.orange{fill:#4a2508;stroke:#f0883e}
.dot{fill:#4493f8}.dot2{fill:#f0883e}.tip{fill:#6e7681}.path{stroke:#f0883e}}
"""


class Picture:
    """Lines of an SVG; positions are pixels from the top left corner."""

    def __init__(self, title: str, height: int) -> None:
        self.height = height
        self.lines = [f"<title>{escape(title)}</title>", f"<style>{_STYLE}</style>"]
        self.rect(0, 0, WIDTH, height, "ground")

    def rect(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A box of the class ``kind``."""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.lines.append(f'<rect class="{kind}" {place} rx="2"/>')

    def text(
        self, x: float, y: float, words: str, kind: str = "ink", anchor: str = "middle"
    ) -> None:
        """One line of text; y is its base line."""
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self.lines.append(f'<text class="{kind}" {place}>{escape(words)}</text>')

    def dot(self, x: float, y: float, radius: float, kind: str) -> None:
        """A disc."""
        self.lines.append(f'<circle class="{kind}" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>')

    def path(self, points: Sequence[tuple[float, float]], kind: str, width: float = 1.5) -> None:
        """A line through points."""
        d = "M" + "L".join(f"{x:g},{y:g}" for x, y in points)
        self.lines.append(f'<path class="{kind}" stroke-width="{width:g}" d="{d}"/>')

    def arrow(self, x: float, y: float, length: float) -> None:
        """To the right."""
        self.path([(x, y), (x + length - 5, y)], "line")
        end = x + length
        self.lines.append(
            f'<path class="tip" d="M{end:g},{y:g}l-8,-4.5v9z"/>',
        )

    def grid(self, x: float, y: float, side: float, cells: int, kind: str) -> None:
        """A square map of ``cells`` times ``cells``."""
        self.rect(x, y, side, side, kind)
        step = side / cells
        for i in range(1, cells):
            self.path([(x + i * step, y), (x + i * step, y + side)], kind, 0.7)
            self.path([(x, y + i * step), (x + side, y + i * step)], kind, 0.7)

    def svg(self) -> str:
        """The file."""
        box = f'viewBox="0 0 {WIDTH} {self.height}" role="img"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>'
        return "\n".join([head, *self.lines, "</svg>", ""])


def strides(backbone: str) -> dict[str, int]:
    """Name of each stage's map to its stride."""
    with torch.device("meta"):
        return {n: s.stride for n, s in build_backbone(backbone).feature_specs.items()}


def detnet() -> Picture:
    """The maps of a small object, stage by stage."""
    picture = Picture("ResNet halves its maps to the end; DetNet keeps 1/16", 386)
    resnet = strides("resnet50")
    pyramid = resnet | {"p6": 2 * max(resnet.values())}  # FPN's sixth level halves the fifth
    rows = [
        ("ResNet-50 with FPN: halved stage by stage; the last maps are coarse", pyramid, "orange"),
        (
            "DetNet-59: stages 5 and 6 stay at 1/16 and dilate their 3x3 convolutions",
            strides("detnet59"),
            "blue",
        ),
    ]
    for row, (title, levels, kind) in enumerate(rows):
        top = 26 + row * 184
        picture.text(24, top, title, "ink big", "start")
        for column, (name, stride) in enumerate(levels.items()):
            x, y, side = 24 + column * 146, top + 14, 112
            late = column >= 3
            picture.grid(x, y, side, 64 // stride, kind if late else "cell")
            picture.dot(x + 0.60 * side, y + 0.40 * side, 9, "dot2" if row == 0 else "dot")
            picture.text(x + side / 2, y + side + 18, f"{name.upper()}, 1/{stride}", "soft")
    return picture


def light_head() -> Picture:
    """From the last map to classes, with widths as the channels."""
    thin, classes = configs.ThinConfig(), 80 + 1
    picture = Picture(
        "R-FCN reads classes off wide maps; Light-Head R-CNN learns a head on thin ones", 340
    )
    rows: list[tuple[str, str, list[tuple[str, str, float]], str]] = [
        (
            "R-FCN: a score map per class and bin",
            "orange",
            [
                ("last map", "2048", 2048),
                (f"{classes} x 7 x 7 maps", f"{classes * 49:,}", classes * 49),
            ],
            "1x1",
        ),
        (
            "Light-Head R-CNN: thin maps, then a head that learns",
            "blue",
            [
                ("last map", "2048", 2048),
                (f"{thin.channels} x 7 x 7 maps", str(thin.channels * 49), thin.channels * 49),
            ],
            f"{thin.kernel}x1, 1x{thin.kernel}",
        ),
    ]
    for row, (title, kind, maps, how) in enumerate(rows):
        top = 28 + row * 162
        picture.text(24, top, title, "ink big", "start")
        (_, before, wide), (label, after, out) = maps
        y, height, scale = top + 22, 76, 0.03
        picture.rect(24, y, wide * scale, height, "cell")
        picture.text(24 + wide * scale / 2, y + height + 18, "C5, " + before, "soft small")
        picture.arrow(104, y + height / 2, 78)
        picture.text(142, y + height / 2 - 9, how, "soft small")
        picture.rect(242 - out * scale / 2 + 10, y, out * scale, height, kind)
        picture.text(252, y + height + 18, f"{label} = {after}", "soft small")
        picture.arrow(324, y + height / 2, 96)
        picture.text(
            370, y + height / 2 - 9, "PS-RoI pool" if row == 0 else "PS-RoIAlign", "soft small"
        )
        picture.text(370, y + height / 2 + 19, "of each RoI", "soft small")
        end(picture, y, height, row)
    return picture


def end(picture: Picture, y: float, height: float, row: int) -> None:
    """What is done with the 7x7 bins of one RoI."""
    bins = 7
    picture.grid(432, y + 9, height - 18, bins, "orange" if row == 0 else "blue")
    middle = y + height / 2
    if row == 0:
        picture.text(461, y + height + 18, f"{80 + 1} x 7 x 7", "soft small")
        picture.arrow(500, middle, 90)
        picture.text(543, middle - 9, "mean of bins", "soft small")
        picture.rect(602, middle - 20, 134, 40, "cell")
        picture.text(669, middle + 5, "classes (box alike)", "ink small")
        return
    picture.text(461, y + height + 18, f"{configs.ThinConfig().channels} x 7 x 7", "soft small")
    picture.arrow(500, middle, 34)
    picture.rect(540, middle - 20, 78, 40, "blue")
    picture.text(579, middle + 5, "FC 2048", "ink small")
    picture.arrow(622, middle, 30)
    picture.rect(658, y + 2, 78, 32, "cell")
    picture.text(697, y + 23, "classes", "ink small")
    picture.rect(658, y + height - 34, 78, 32, "cell")
    picture.text(697, y + height - 13, "one box", "ink small")


def pod() -> Picture:
    """The taps of a learnt scale, and the two convolutions it becomes."""
    learnt, channels = (1.6, 2.35), 256
    net = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))
    layers = scales.insert(net, lambda *_: True)
    (layer,) = scales.plan(layers, {layers[0].path: learnt}).layers
    picture = Picture("A learnt scale becomes two plain convolutions at whole dilations", 312)
    panels = [(24, learnt, "dot2", f"taps {learnt[0]} down, {learnt[1]} across")]
    for x, part in zip((296, 568), layer.parts, strict=True):
        label = f"{part.channels} of {channels} channels: {part.reach[0]} x {part.reach[1]}"
        panels.append((x, part.reach, "dot", label))
    cell, side, top = 24, 7, 46
    for x, (down, across), kind, label in panels:
        picture.grid(x, top, cell * side, side, "cell")
        middle_x, middle_y = x + cell * side / 2, top + cell * side / 2
        for i, j in product((-1, 0, 1), repeat=2):
            picture.dot(middle_x + j * across * cell, middle_y + i * down * cell, 6.5, kind)
        picture.text(middle_x, top + cell * side + 21, label, "ink small")
    picture.text(24, 29, "1. Learn the scale", "ink big", "start")
    picture.text(296, 29, "2. Share the channels between two whole dilations", "ink big", "start")
    picture.arrow(204, 130, 80)
    picture.text(241, 120, "decompose", "soft small")
    picture.text(516, 135, "and", "soft")
    notes = (
        (24, "one scale per layer and image; / values between pixels are / interpolated"),
        (
            296,
            "ordinary convolutions of the same cost; the shares / keep the mean scale; the learnt"
            " weights are cut to fit / and fine-tuned",
        ),
    )
    for x, note in notes:
        for row, line in enumerate(note.split(" / ")):
            picture.text(x, 262 + row * 17, line, "soft small", "start")
    return picture


def detnas() -> Picture:
    """A path through the supernet, and the four steps."""
    found = ARCHITECTURES["detnas-300m"]
    space = SPACES[found.space]
    genes = [int(gene) for gene in found.genes.replace("-", "")]
    names = {"shuffle3": "shuffle 3x3", "shuffle5": "shuffle 5x5", "shuffle7": "shuffle 7x7"}
    picture = Picture("One supernet holds every candidate; a path through it is a network", 346)
    picture.text(
        24, 30, "A supernet: four blocks at each position; a network is a path", "ink big", "start"
    )
    step, left, top = 28, 126, 48
    positions, x = [], float(left)
    for blocks in space.blocks:
        for _ in range(blocks):
            positions.append(x)
            x += step
        x += 12
    for choice, op in enumerate(space.ops):
        picture.text(left - 12, top + choice * 34 + 18, names.get(op, op), "soft small", "end")
        for at, x in enumerate(positions):
            picture.rect(x, top + choice * 34, 22, 26, "orange" if genes[at] == choice else "cell")
    picture.path(
        [(x + 11, top + gene * 34 + 13) for x, gene in zip(positions, genes, strict=True)],
        "path",
        2,
    )
    for stage, first in enumerate((0, 4, 8, 16)):
        picture.text(positions[first], top + 152, f"C{stage + 2}", "soft small", "start")
    steps = [
        ("1. Pre-train", "the supernet, as a", "classifier; one random", "path at each step"),
        ("2. Fine-tune", "it in the detector;", "some training images", "are held out"),
        ("3. Search", "score paths on those", "images; breed the best", "within a limit"),
        ("4. Train", "the winner alone,", "from nothing: classifier,", "then detector"),
    ]
    for i, (title, *words) in enumerate(steps):
        x = 24 + i * 184
        picture.rect(x, 226, 164, 98, "blue" if i < 3 else "orange")
        picture.text(x + 12, 249, title, "ink big", "start")
        for line, text in enumerate(words):
            picture.text(x + 12, 271 + line * 18, text, "ink small", "start")
        if i < 3:
            picture.arrow(x + 165, 275, 18)
    return picture


PICTURES: dict[str, Callable[[], Picture]] = {
    "detnet": detnet,
    "light_head": light_head,
    "pod": pod,
    "detnas": detnas,
}


def main() -> None:
    """All of them."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
