"""Pictures of boxes: they show what they should and take any image."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from detkit.report.figures import color, draw_boxes, draw_predictions, grid

NAMES = {1: "cat", 2: "dog"}
ROW = {"category_id": 1, "bbox": [100, 150, 200, 120]}


def blank(width: int = 400, height: int = 400, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height))


def test_box_is_drawn_where_it_is_and_the_image_is_left_alone() -> None:
    image = blank()
    picture = draw_boxes(image, [{**ROW, "score": 0.5}], NAMES)
    assert picture.size == image.size
    assert picture.getpixel((100, 250)) == picture.getpixel((300, 269)) == color(1)
    assert picture.getpixel((200, 200)) == (0, 0, 0)  # inside stays
    assert not np.asarray(image).any()


def test_label_stands_above_the_box_or_inside_it_at_the_border() -> None:
    above = np.asarray(draw_boxes(blank(), [ROW], NAMES))
    assert (above[140, 102] == color(1)).all()
    top = np.asarray(draw_boxes(blank(), [{**ROW, "bbox": [100, 2, 200, 120]}], NAMES))
    assert (top[5, 101] == color(1)).all()


def test_names_and_scores_are_written() -> None:
    """Another name or score gives another picture; the class decides the colour."""
    pictures = [
        np.asarray(draw_boxes(blank(), [row], names))
        for row, names in (
            (ROW, NAMES),
            (ROW, {1: "cow"}),
            (ROW, {}),
            ({**ROW, "score": 0.25}, NAMES),
            ({**ROW, "score": 0.75}, NAMES),
            ({**ROW, "category_id": 2}, NAMES),
        )
    ]
    assert len({p.tobytes() for p in pictures}) == len(pictures)


def test_pairs_show_only_confident_predictions() -> None:
    detections = [{**ROW, "score": 0.4}]
    hidden = draw_predictions(blank(), detections, [], NAMES)
    shown = draw_predictions(blank(), detections, [], NAMES, min_score=0.3)
    width, height = hidden.size
    assert width >= 2 * 400
    assert height > 400
    assert color(1) not in {c for _, c in hidden.getcolors(1 << 20)}
    right = shown.crop((width // 2, 0, width, height))
    assert color(1) in {c for _, c in right.getcolors(1 << 20)}
    left = shown.crop((0, 0, 400, height))
    assert color(1) not in {c for _, c in left.getcolors(1 << 20)}


def test_masks_are_tinted() -> None:
    polygon = {**ROW, "segmentation": [[150, 180, 250, 180, 250, 240, 150, 240]]}
    assert draw_boxes(blank(), [polygon], NAMES).getpixel((200, 210)) != (0, 0, 0)
    runs = {"size": [400, 400], "counts": [80000, 40000, 40000]}  # columns 200 to 299
    picture = draw_boxes(blank(), [{**ROW, "segmentation": runs}], NAMES)
    assert picture.getpixel((250, 30)) != (0, 0, 0)
    assert picture.getpixel((150, 30)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16", "F"])
@pytest.mark.parametrize("size", [(1, 1), (20, 900), (400, 300)])
def test_any_mode_and_size(mode: str, size: tuple[int, int]) -> None:
    rows = [{"category_id": 1, "bbox": [0, 0, *size], "score": 0.9}]
    picture = draw_predictions(blank(*size, mode), rows, rows, NAMES)
    assert picture.mode == "RGB"
    assert color(1) in {c for _, c in picture.getcolors(1 << 22)}


@pytest.mark.parametrize(
    "box", [[float("nan")] * 4, [-50, -50, 900, 900], [5, 5, -3, 2], [9, 9, 0, 0], None]
)
def test_odd_boxes_do_not_break_the_picture(box: list[float] | None) -> None:
    assert draw_boxes(blank(), [{**ROW, "bbox": box}, ROW], NAMES).getpixel((100, 250)) == color(1)


def test_large_images_shrink_and_small_ones_grow() -> None:
    assert draw_boxes(blank(4000, 2000), [], NAMES).size == (1600, 800)
    assert draw_boxes(blank(80, 40), [], NAMES).size == (640, 320)


def test_grid_places_every_picture() -> None:
    pictures = [Image.new("RGB", (10, 20), (n, 0, 0)) for n in (50, 100, 150)]
    sheet = grid(pictures, columns=2, gap=4)
    assert sheet.size == (24, 44)
    assert [sheet.getpixel(at)[0] for at in ((5, 5), (19, 5), (5, 30), (19, 30))] == [
        50,
        100,
        150,
        255,
    ]
    with pytest.raises(ValueError, match="at least one picture"):
        grid([])
