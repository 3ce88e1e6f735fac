"""Writes the two tables of docs/detectors.md anew: `python tools/detector_tables.py`."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from detkit import api
from detkit.config import read_toml, recipe_path, resolve
from detkit.models import build_backbone, count_classifier, count_detector

DOC = Path(__file__).resolve().parent.parent / "docs" / "detectors.md"
SIZE = (800, 1344)  # 800x1333, padded to a multiple of 32
# Recipe, part, image; parameters and MACs by hand from the layer tables; what the paper prints.
PARTS = (
    ("detnet/imagenet-resnet50", "classifier", "224x224", "25,557,032", "3.858", "3.8 G"),
    ("detnet/imagenet-resnet101", "classifier", "224x224", "44,549,160", "7.570", "7.6 G"),
    ("detnet/imagenet-detnet59", "classifier", "224x224", "18,372,648", "4.846", "4.8 G"),
    ("detnet/imagenet-detnet59-noproj", "classifier", "224x224", "17,322,024", "4.640", "4.6 G"),
    ("light-head/imagenet-xception145", "classifier", "224x224", "1,531,936", "0.143", "145 M"),
    ("detnas/imagenet-300m", "classifier", "224x224", "3,533,112", "0.321", "3.5 M parameters"),
    ("detnas/imagenet-1.3g", "classifier", "224x224", "10,426,328", "1.318", "10.4 M parameters"),
    ("detnas/imagenet-3.8g", "classifier", "224x224", "31,444,596", "4.086", ""),
    ("detnet/resnet50-fpn", "backbone", "800x1344", "23,508,032", "82.6", ""),
    ("detnet/resnet50-dilated-fpn", "backbone", "800x1344", "23,508,032", "129.7", "6.1 G at 224"),
    ("detnet/resnet101-fpn", "backbone", "800x1344", "42,500,160", "162.2", ""),
    ("detnet/detnet59-fpn", "backbone", "800x1344", "17,347,648", "103.8", ""),
    ("detnet/detnet59-noproj-fpn", "backbone", "800x1344", "16,297,024", "99.4", ""),
    ("detnet/resnet50-fpn", "neck", "800x1344", "3,344,384", "60.9", ""),
    ("detnet/detnet59-fpn", "neck", "800x1344", "3,934,720", "66.9", ""),
    ("detnet/resnet50-fpn", "rpn", "800x1344", "593,935", "53.1", ""),
    ("detnet/detnet59-fpn", "rpn", "800x1344", "593,935", "57.3", ""),
    ("light-head/rfcn-b2", "neck", "800x1200", "6,367,301", "23.9", ""),
    ("light-head/setting-l", "backbone", "800x1200", "42,500,160", "186.8", ""),
    ("light-head/setting-l", "neck", "800x1200", "19,493,332", "73.1", ""),
    ("light-head/setting-l", "rpn", "800x1200", "4,765,274", "17.9", ""),
    ("light-head/setting-l", "head", "800x1200", "1,179,733", "1.18", ""),
    ("light-head/setting-l", "total", "800x1200", "67,938,499", "279", ""),
    ("light-head/setting-s-700", "backbone", "700x1100", "954,936", "2.21", ""),
    ("light-head/setting-s-700", "neck", "700x1100", "2,047,828", "1.58", ""),
    ("light-head/setting-s-700", "rpn", "700x1100", "686,938", "2.08", ""),
    ("light-head/setting-s-700", "head", "700x1100", "1,179,733", "1.18", ""),
    ("light-head/setting-s-700", "total", "700x1100", "4,869,435", "7.05", ""),
    ("detnas/300m-fpn", "backbone", "800x1344", "1,849,680", "6.17", ""),
    ("detnas/300m-fpn", "neck", "800x1344", "2,666,496", "54.9", ""),
    ("detnas/300m-fpn", "head", "800x1344", "15,618,449", "128.9", ""),
    ("detnas/300m-retinanet", "total", "800x1344", "11,742,996", "165.4", ""),
)


def parts_table() -> list[str]:
    """Parts of the recipes beside their published or hand-summed sizes."""
    lines = [
        "| recipe | part | image | parameters | by hand | GMACs | by hand | printed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe, part, image, params, gmacs, printed in PARTS:
        config = resolve([read_toml(recipe_path(recipe))])
        height, width = map(int, image.split("x"))
        if part == "classifier":
            with torch.device("meta"):
                net = build_backbone(config.model.backbone)
            found = count_classifier(net, 1000, height)["total"]
        else:
            found = count_detector(config, api.COCO_CLASSES, height, width)[part]
        digits = len(gmacs.partition(".")[2])
        cells = (recipe, part, image, f"{found.params:,}", params)
        cost = f"{found.macs / 1e9:.{digits}f}"
        lines.append("| " + " | ".join([*cells, cost, gmacs, printed or "-"]) + " |")
    return lines


def whole_table() -> list[str]:
    """Millions of parameters and GMACs of every detector on every backbone."""
    rows = api.model_table(SIZE)["detectors"]
    detectors = list(dict.fromkeys(row["name"] for row in rows))
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    cost = {
        (r["backbone"], r["name"]): f"{r['params'] / 1e6:.2f} / {r['macs'] / 1e9:.1f}" for r in rows
    }
    lines = [f"| backbone | {' | '.join(detectors)} |", "|---" * (len(detectors) + 1) + "|"]
    for backbone in backbones:
        cells = [cost.get((backbone, detector), "-") for detector in detectors]
        lines.append(f"| {backbone} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Replace each table below its marker."""
    text = DOC.read_text(encoding="utf-8")
    for name, lines in (("parts", parts_table()), ("whole", whole_table())):
        pattern = rf"(<!-- {name} -->\n)(?:\|.*\n)*"
        text, count = re.subn(pattern, lambda m: m[1] + "\n".join(lines) + "\n", text)  # noqa: B023
        if count != 1:
            raise SystemExit(f"{DOC}: must have one marker <!-- {name} -->, got {count}")
    DOC.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
