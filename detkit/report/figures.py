"""Pictures of boxes: predictions beside the truth, and grids of them. Pillow only.

Rows are COCO annotations or results: "category_id", "bbox" [x, y, width, height] in pixels of the
image, and where there are any "score" and "segmentation".
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detkit import rle

Record = dict[str, Any]
Color = tuple[int, int, int]

SMALLEST_SIDE = 320
"""Images with a shorter side below this are enlarged, or labels would cover them."""
LARGEST_SIDE = 1600
BACKGROUND: Color = (255, 255, 255)
INK: Color = (20, 20, 20)


def draw_predictions(
    image: Image.Image,
    detections: Sequence[Record],
    truth: Sequence[Record],
    names: Mapping[int, str],
    *,
    min_score: float = 0.5,
) -> Image.Image:
    """The truth of an image on the left and its predictions on the right, each under a title.

    Args:
        image: as shown (EXIF applied), any mode; left as it is.
        detections: COCO results of this image; those below ``min_score`` are left out.
        truth: COCO annotations of this image.
        names: category id to name.
        min_score: lowest score drawn.
    """
    shown = [d for d in detections if d["score"] >= min_score]
    panels = {
        f"truth: {len(truth)}": draw_boxes(image, truth, names),
        f"predictions, score from {min_score:g}: {len(shown)}": draw_boxes(image, shown, names),
    }
    return grid([titled(panel, title) for title, panel in panels.items()], columns=2)


def draw_boxes(image: Image.Image, rows: Sequence[Record], names: Mapping[int, str]) -> Image.Image:
    """A copy of the image with boxes, masks and labels; the best score is drawn last, on top."""
    picture, scale = _resized(image)
    ordered = sorted(rows, key=lambda r: r.get("score", 1.0))
    for row in sorted(rows, key=_size, reverse=True):  # small masks stay visible on large ones
        _draw_mask(picture, row, scale)
    pen = ImageDraw.Draw(picture)
    font = _font(picture)
    boxes = [(row, _corners(row, scale)) for row in ordered]
    for row, box in boxes:
        if box is not None:
            pen.rectangle(box, outline=color(row["category_id"]), width=_line(picture))
    for row, box in boxes:  # labels after all boxes, or a box would cross out a neighbour's name
        if box is not None:
            _draw_label(pen, picture.size, box, _label(row, names), color(row["category_id"]), font)
    return picture


def grid(pictures: Sequence[Image.Image], *, columns: int = 1, gap: int = 8) -> Image.Image:
    """Pictures in rows of ``columns`` on a white sheet; as large as its largest need.

    Raises:
        ValueError: there are no pictures.
    """
    if not pictures:
        raise ValueError("grid: there must be at least one picture, got none")
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    widths = [
        max(p.width for p in pictures[c::columns]) for c in range(min(columns, len(pictures)))
    ]
    heights = [max(p.height for p in row) for row in rows]
    size = (sum(widths) + gap * (len(widths) - 1), sum(heights) + gap * (len(heights) - 1))
    sheet = Image.new("RGB", size, BACKGROUND)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(picture, (sum(widths[:c]) + gap * c, sum(heights[:r]) + gap * r))
    return sheet


def color(category_id: int) -> Color:
    """A strong colour, far from those of the neighbouring ids (hue turns by the golden ratio)."""
    hue = (category_id * 0.618033988749895) % 1
    r, g, b = colorsys.hsv_to_rgb(hue, 0.85, 0.95)
    return round(255 * r), round(255 * g), round(255 * b)


def _resized(image: Image.Image) -> tuple[Image.Image, float]:
    """RGB copy in a size where labels can be read, and its factor."""
    short, long = min(image.size), max(image.size)
    scale = min(max(1.0, SMALLEST_SIDE / short), LARGEST_SIDE / long)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if image.mode.startswith(("I", "F")):  # 16 bit and float grey: convert() would cut at 255
        values = np.asarray(image, dtype=np.float64)
        top = float(values.max())
        image = Image.fromarray((values * (255 / top if top > 0 else 1)).astype(np.uint8))
    return image.convert("RGB").resize(size), scale


def _corners(row: Record, scale: float) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom in the picture; None for a box that cannot be drawn."""
    box = row.get("bbox")
    if not box or not all(math.isfinite(v) for v in box) or min(box[2], box[3]) < 0:
        return None
    x, y, width, height = box
    return x * scale, y * scale, (x + width) * scale, (y + height) * scale


def _size(row: Record) -> float:
    box = row.get("bbox") or (0.0, 0.0, 0.0, 0.0)
    return float(box[2] * box[3])


def _label(row: Record, names: Mapping[int, str]) -> str:
    name = names.get(row["category_id"], str(row["category_id"]))
    return f"{name} {row['score']:.2f}" if "score" in row else name


def _font(picture: Image.Image) -> Any:
    return ImageFont.load_default(size=max(12, min(picture.size) // 32))


def _line(picture: Image.Image) -> int:
    return max(2, min(picture.size) // 240)


def _draw_label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    text: str,
    fill: Color,
    font: Any,
) -> None:
    """Text on a filled patch above the box, or inside its top edge where there is no room above."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = min(max(0.0, box[0]), max(0.0, size[0] - width))
    y = box[1] - height if box[1] >= height else box[1]
    y = min(max(0.0, y), max(0.0, size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=fill)
    bright = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 140
    ink = INK if bright else BACKGROUND
    pen.text((x + 3 - left, y + 3 - top), text, fill=ink, font=font)


def _draw_mask(picture: Image.Image, row: Record, scale: float) -> None:
    shape = row.get("segmentation")
    if not shape:
        return
    if isinstance(shape, dict):
        mask = Image.fromarray(rle.decode(shape) * np.uint8(110)).resize(picture.size)
    else:
        mask = Image.new("L", picture.size)
        pen = ImageDraw.Draw(mask)
        for polygon in rle.usable_polygons(shape):
            pen.polygon([v * scale for v in polygon], fill=110)
    picture.paste(color(row["category_id"]), mask=mask)


def titled(picture: Image.Image, title: str) -> Image.Image:
    """The picture under a line of text, which loses its beginning where it is too long."""
    font = _font(picture)
    bar = int(font.size) + 10
    while len(title) > 4 and font.getlength(title) > picture.width - 8:
        title = f"…{title[2:]}"
    sheet = Image.new("RGB", (picture.width, picture.height + bar), BACKGROUND)
    ImageDraw.Draw(sheet).text((4, 3), title, fill=INK, font=font)
    sheet.paste(picture, (0, bar))
    return sheet
