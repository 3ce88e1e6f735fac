"""Detections of an exported detector, with ONNX Runtime, Pillow and NumPy alone.

    python examples/onnx_detect.py detector.onnx IMAGES... [--score 0.3] [--draw DIR] [--json]

All it needs to know stands in the file's metadata: categories, the size images are brought to, and
where a mask's probability becomes a pixel. It imports neither detkit nor PyTorch: copy what you
need of it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

Array = NDArray[Any]


class Detector:
    """An exported detector with what its file says of itself.

    Args:
        path: The ONNX file.
    """

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        entries = self.session.get_modelmeta().custom_metadata_map
        self.meta = {key: json.loads(value) for key, value in entries.items()}
        self.names = {entry["label"]: entry["name"] for entry in self.meta["categories"]}
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, image: Image.Image) -> dict[str, Array]:
        """Boxes (R, 4) xyxy in pixels of ``image``, labels, scores, and masks (R, H, W) if any."""
        pixels = prepared(image, self.meta)
        height, width = pixels.shape[:2]
        size = np.array([[height, width]])
        planes = on_canvas(pixels, self.session.get_inputs()[0].shape[2:]).transpose(2, 0, 1)[None]
        values = self.session.run(None, {"images": planes, "sizes": size})
        found = dict(zip(self.outputs, values, strict=True))
        count = found.pop("count")[0]
        found = {name: rows[0, :count] for name, rows in found.items()}
        edge = np.array([image.width, image.height] * 2)
        moved = found["boxes"].astype(np.float64) * (edge / np.array([width, height] * 2))
        found["boxes"] = np.clip(moved, 0, edge)
        if "masks" in found:
            masks = np.zeros((count, image.height, image.width), bool)
            for mask, cells, box in zip(masks, found["masks"], found["boxes"], strict=True):
                mask[:] = pasted(cells, box, *mask.shape) >= self.meta["mask_threshold"]
            found["masks"] = masks
        return found


def prepared(image: Image.Image, meta: dict[str, Any]) -> Array:
    """Pixels (h, w, 3) uint8 at the size the detector wants: the shorter side ``short_side``, the
    longer at most ``long_side``.
    """
    short, long = sorted(image.size)
    factor = min(meta["short_side"] / short, meta["long_side"] / long)
    antialias = meta["resize"] == "antialias"
    half = 0.5 if antialias else 0.0  # rounded to the nearest pixel, or down
    width, height = (max(1, math.floor(side * factor + half)) for side in image.size)
    if antialias:  # bilinear, as wide as the step when shrinking
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    pixels = np.asarray(image, np.float64)
    for axis, size in ((0, height), (1, width)):  # bilinear, two neighbours whatever the step
        centres = (np.arange(size) + 0.5) * pixels.shape[axis] / size - 0.5
        pixels = interpolated(pixels, centres, axis)
    return np.rint(pixels).astype(np.uint8)


def interpolated(values: Array, positions: Array, axis: int) -> Array:
    """``values`` at fractional ``positions`` along ``axis``, constant beyond the first and last."""
    last = values.shape[axis] - 1
    positions = positions.clip(0, last)
    low = np.floor(positions).astype(int)
    high = np.minimum(low + 1, last)
    part = (positions - low).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    return values.take(low, axis) * (1 - part) + values.take(high, axis) * part


def on_canvas(pixels: Array, shape: list[int | str]) -> Array:
    """``pixels`` in the top left of the size the file was made for, if it was made for one."""
    if not all(isinstance(side, int) for side in shape):
        return pixels
    height, width = (int(side) for side in shape)
    if pixels.shape[0] > height or pixels.shape[1] > width:
        raise SystemExit(f"the file takes {height}x{width} pixels, got {pixels.shape[:2]}")
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
    return canvas


def pasted(cells: Array, box: Array, height: int, width: int) -> Array:
    """Probabilities (height, width) of a mask's cells (M, M): bilinear at the pixels whose centres
    lie in the box, zero elsewhere.
    """
    out = np.zeros((height, width))
    x1, y1, x2, y2 = box
    rows, columns = inside(y1, y2, height), inside(x1, x2, width)
    if len(rows) and len(columns):
        side = len(cells)
        values = interpolated(cells, (rows + 0.5 - y1) / (y2 - y1) * side - 0.5, 0)
        values = interpolated(values, (columns + 0.5 - x1) / (x2 - x1) * side - 0.5, 1)
        out[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = values
    return out


def inside(low: float, high: float, limit: int) -> Array:
    """Pixels 0..limit-1 whose centres lie in [low, high)."""
    return np.arange(max(0, math.ceil(low - 0.5)), min(limit, math.ceil(high - 0.5)))


def drawn(image: Image.Image, found: dict[str, Array], names: dict[int, str]) -> Image.Image:
    """A copy of ``image`` with masks, boxes and names."""
    picture = image.copy()
    for mask in found.get("masks", ()):
        picture.paste((255, 200, 0), mask=Image.fromarray(mask.astype(np.uint8) * 90))
    pen = ImageDraw.Draw(picture)
    for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True):
        pen.rectangle(box.tolist(), outline=(255, 60, 0), width=2)
        pen.text((box[0] + 3, box[1] + 1), f"{names[int(label)]} {score:.2f}", fill=(255, 60, 0))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description="Detections of an exported detector.")
    parser.add_argument("detector", type=Path, help="the ONNX file")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score shown")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="folder for pictures")
    parser.add_argument("--json", action="store_true", help="one JSON object per image")
    options = parser.parse_args()
    detector = Detector(options.detector)
    for path in options.images:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        found = detector(image)
        found = {name: rows[found["scores"] >= options.score] for name, rows in found.items()}
        if options.draw:
            options.draw.mkdir(parents=True, exist_ok=True)
            drawn(image, found, detector.names).save(options.draw / f"{path.stem}.png")
        rows = [
            {"name": detector.names[int(label)], "score": float(score), "box": box.tolist()}
            for box, label, score in zip(
                found["boxes"], found["labels"], found["scores"], strict=True
            )
        ]
        if options.json:
            print(json.dumps({"file": str(path), "detections": rows}))
            continue
        print(f"{path}: {len(rows)} detections")
        for row in rows:
            corners = " ".join(f"{v:.1f}" for v in row["box"])
            print(f"  {row['name']:20s} {row['score']:.3f}  {corners}")


if __name__ == "__main__":
    main()
