"""Best and worst images of the first run: the truth, and what each run detected, side by side."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from detkit.engine.error_types import KINDS
from detkit.errors import DetkitError
from detkit.report.accuracy import Scored, scored
from detkit.report.evaluation import Evaluation, Record
from detkit.report.figures import draw_boxes
from detkit.report.page import Section, paragraph
from detkit.report.runs import Run

COUNT = 6
"""Images of each kind; an image is among the worst or the best, never both."""
SIZES = ((480, 82), (420, 74), (360, 66), (300, 58), (240, 50), (180, 42), (120, 35))
"""Longer side in pixels and JPEG quality, tried in this order until the pictures fit."""

SAMPLE = 8
"""Pictures that tell how large all will be."""


@dataclass(frozen=True)
class Picture:
    """One picture with its line of text."""

    image: Image.Image
    text: str


def pictures(runs: Sequence[Run], room: int) -> Section | None:
    """The section, its pictures small enough for ``room`` bytes of the page."""
    found = scored(runs)
    if not found:
        return None
    first = found[0][2]
    found = [row for row in found if row[2].truth["images"] == first.truth["images"]]
    worst, best = extremes(first)
    groups = {
        "Worst images": [_row(found, place) for place in worst],
        "Best images": [_row(found, place) for place in best],
    }
    fewer = _fit([p for rows in groups.values() for row in rows for p in row], room)
    body = paragraph(
        f"By {'the first run' if len(found) > 1 else 'this run'}'s panoptic quality of boxes: the "
        "overlaps of the hits, divided by hits and half of the misses and false positives. Shown "
        "are scores from where the run's mean F1 is best.",
        "quiet",
    )
    codes: Iterator[str] = iter(fewer)
    for title, rows in groups.items():
        cards = "".join(_card(row, codes) for row in rows)
        body += f'<h3>{title}</h3><div class="cards">{cards}</div>' if rows else ""
    return Section("pictures", "Images", body) if any(groups.values()) else None


def extremes(e: Evaluation, count: int = COUNT) -> tuple[list[int], list[int]]:
    """Places of the worst and of the best images; of equals those with more objects."""
    objects = np.bincount(e.matches["bbox"].object_images, minlength=len(e.truth["images"]))
    known = [(q, -int(objects[i]), i) for i, q in enumerate(e.quality) if q is not None]
    worst = [i for *_, i in sorted(known)[: min(count, (len(known) + 1) // 2)]]
    rest = [(-q, n, i) for q, n, i in known if i not in worst]
    return worst, [i for *_, i in sorted(rest)[:count]]


def _row(found: Scored, place: int) -> list[Picture]:
    """Truth and detections of one image."""
    first = found[0][2]
    record = first.truth["images"][place]
    try:
        image = first.open(record["id"])
    except DetkitError as error:
        return [Picture(Image.new("RGB", (320, 240), (128, 128, 128)), str(error))]
    names = {c["id"]: c["name"] for c in first.truth["categories"]}
    objects = [_box(a) for a in first.truth["annotations"] if a["image_id"] == record["id"]]
    file = record.get("file_name", record["id"])
    row = [Picture(draw_boxes(image, objects, names), f"{file}: truth, {_objects(len(objects))}")]
    for _, run, e in found:
        shown = [
            r
            for r in e.results
            if r["image_id"] == record["id"] and r["score"] >= e.curves.threshold
        ]
        text = f"{run.name}: {_summary(e, place)}"
        row.append(Picture(draw_boxes(image, shown, names), text))
    return row


def _objects(count: int) -> str:
    return "1 object" if count == 1 else f"{count} objects"


def _box(annotation: Record) -> Record:
    return {
        key: annotation[key] for key in ("category_id", "bbox", "segmentation") if key in annotation
    }


def _summary(e: Evaluation, place: int) -> str:
    """Quality, hits and errors of one image."""
    matches, quality = e.matches["bbox"], e.quality[place]
    own = (matches.images == place) & (matches.scores >= e.curves.threshold)
    own &= matches.counted[0]
    hits = int(np.count_nonzero(own & matches.hit[0]))
    total = int(np.count_nonzero((matches.object_images == place) & ~matches.crowd))
    wrong = [
        f"{np.count_nonzero(own & (e.errors.kinds == k))} {name}"
        for k, name in enumerate(KINDS[:-1])
        if np.any(own & (e.errors.kinds == k))
    ]
    text = f"quality {quality:.2f}, " if quality is not None else ""
    return f"{text}{hits} of {total} found" + (f"; errors: {', '.join(wrong)}" if wrong else "")


def _card(row: Sequence[Picture], codes: Iterator[str]) -> str:
    cells = "".join(
        f'<div><img decoding="async" alt="{escape(p.text)}" src="{next(codes)}">'
        f"<span>{escape(p.text)}</span></div>"
        for p in row
    )
    return f'<figure><div class="pictures">{cells}</div></figure>'


def _fit(found: Sequence[Picture], room: int) -> list[str]:
    """The pictures as data URIs, as good as fits into ``room`` bytes."""
    sample = found[:: max(1, len(found) // SAMPLE)]
    codes: list[str] = []
    for side, quality in SIZES:
        if (side, quality) != SIZES[-1]:
            sizes = [len(_encoded(picture.image, side, quality)) for picture in sample]
            if sum(sizes) / max(1, len(sizes)) * len(found) > room:
                continue
        codes = [_encoded(picture.image, side, quality) for picture in found]
        if sum(map(len, codes)) <= room:
            break
    return codes


def _encoded(image: Image.Image, side: int, quality: int) -> str:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.convert("RGB").save(file, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
