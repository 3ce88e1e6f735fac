"""What somebody who runs an exported detector must know, written into its file as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from detkit.config import Config
from detkit.models.zoo import WITH_MASKS
from detkit.types import CategoryMap

FORMAT = "detkit-onnx/1"


def describe(config: Config, categories: CategoryMap) -> dict[str, str]:
    """The entries of ``metadata_props``; each value is JSON. docs/export.md lists them.

    Args:
        config: What the detector was built with.
        categories: Its labels.
    """
    data, box = config.data, config.box
    entries: dict[str, Any] = {
        "format": FORMAT,
        "detector": config.model.detector,
        "backbone": config.model.backbone,
        "categories": [
            {"label": label, "id": category_id, "name": name}
            for label, (category_id, name) in enumerate(
                zip(categories.ids, categories.names, strict=True), 1
            )
        ],
        "short_side": data.short_side,
        "long_side": data.long_side,
        "resize": data.resize,
        "pad_multiple": data.pad_multiple,
        "mean": list(data.mean),
        "std": list(data.std),
        "channels": data.channels,
        "score_threshold": box.score_threshold,
        "nms_iou": box.nms_iou,
        "max_detections": box.max_detections,
    }
    if config.model.detector in WITH_MASKS:
        entries["mask_threshold"] = config.mask.threshold
    return {key: json.dumps(value) for key, value in entries.items()}


def put(model: Any, entries: Mapping[str, str]) -> None:
    """Write ``entries`` into an ``onnx.ModelProto``, in place of the tracer's own remarks.

    These hold lines of source code with the paths of the machine that traced the model.
    """
    graph = model.graph
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    del graph.metadata_props[:]
    del model.metadata_props[:]
    for key, value in entries.items():
        model.metadata_props.add(key=key, value=value)
