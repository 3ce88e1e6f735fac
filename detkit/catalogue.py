"""Every backbone, supernet, detector and recipe with its costs: what `detkit models` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from detkit import config as configs
from detkit.errors import ConfigError
from detkit.models.count import count_classifier, count_detector, shapes_only
from detkit.models.search_space import PREFIX, SPACES, SUPERNETS, parse_architecture
from detkit.models.zoo import BACKBONES, DETECTORS, build_backbone
from detkit.nas.cost import cost_table

COCO_CLASSES = 80


def model_table(
    size: tuple[int, int] | None = None, backbone: str | None = None, detector: str | None = None
) -> dict[str, Any]:
    """Every backbone, supernet, detector and recipe, as ``detkit models --json`` prints them.

    Args:
        size: (height, width): also count whole detectors with 80 classes on one such image.
        backbone: only this one; any network of DetNAS (``detnas:small:2120...``) too.
        detector: only this one.

    Raises:
        ConfigError: an unknown name.
    """
    if backbone is not None and backbone.startswith(PREFIX):
        parse_architecture(backbone)
        nets = [backbone]
    else:
        nets = _named("--backbone", backbone, BACKBONES | SUPERNETS)
    detectors = _named("--detector", detector, DETECTORS)
    backbones = [name for name in nets if name not in SUPERNETS]
    return {
        "backbones": [_backbone_row(name) for name in backbones],
        "supernets": [_supernet_row(name) for name in nets if name in SUPERNETS],
        "detectors": [row for name in detectors for row in _detector_rows(name, backbones, size)],
        "recipes": [
            {"name": name, "summary": _recipe_summary(path), "path": str(path)}
            for name, path in configs.recipes().items()
        ],
    }


def _named(flag: str, name: str | None, table: Mapping[str, Any]) -> list[str]:
    if name is None:
        return list(table)
    if name not in table:
        raise ConfigError(
            f"{flag}: must be one of {', '.join(table)}, got {name!r}{configs.suggest(name, table)}"
        )
    return [name]


def _backbone_row(name: str) -> dict[str, Any]:
    with shapes_only():
        backbone = build_backbone(name)
    cost = count_classifier(backbone)
    stages = [
        {"name": level, "channels": spec.channels, "stride": spec.stride}
        for level, spec in backbone.feature_specs.items()
    ]
    total = cost["total"]
    return {"name": name, "params": total.params, "macs_224": total.macs, "stages": stages}


def _supernet_row(name: str) -> dict[str, Any]:
    """Parameters as a classifier of 1000 classes, and the range of what a search limits."""
    space = SPACES[SUPERNETS[name]]
    table = cost_table(space)
    return {
        "name": name,
        "space": space.name,
        "positions": len(space),
        "choices": len(space.ops),
        "params": table.supernet_params() + table.tail.params,
        "body_macs_224": list(table.body_macs_range()),
    }


def _detector_rows(
    name: str, backbones: Iterable[str], size: tuple[int, int] | None
) -> list[dict[str, Any]]:
    if size is None:
        return [{"name": name}]
    rows = []
    for backbone in backbones:
        config = configs.resolve([{"model": {"detector": name, "backbone": backbone}}])
        cost = count_detector(config, COCO_CLASSES, *size)["total"]
        rows.append(
            {
                "name": name,
                "backbone": backbone,
                "size": list(size),
                "params": cost.params,
                "macs": cost.macs,
            }
        )
    return rows


def _recipe_summary(path: Path) -> str:
    """First comment line of a recipe."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
