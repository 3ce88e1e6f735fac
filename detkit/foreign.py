"""Checkpoints of any origin: detkit's own files, and torchvision's weights as if detkit's.

A torchvision file holds tensors alone. What detkit keeps beside them is known from their names and
shapes: which model they are of, and with that the recipe that holds torchvision's conventions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from detkit import config as configs
from detkit.engine import checkpoint as checkpoints
from detkit.engine.checkpoint import Checkpoint
from detkit.errors import CheckpointError
from detkit.models.torchvision_keys import TorchvisionModel, convert, recognise
from detkit.types import CategoryMap

_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
    "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, "
    "sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, "
    "bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, "
    "carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, "
    "tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, "
    "refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
COCO = tuple(_NAMES.split(", "))
"""Names of COCO's 80 categories, by rising id."""
COCO_GAPS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
"""Ids in 1..90 that no category has."""
COCO_OUTPUTS = 91  # ids 0 (torchvision's background) to 90


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint of detkit, or weights of torchvision as one.

    ``provenance["torchvision"]`` says what was recognised.

    Raises:
        CheckpointError: Damaged, or of neither.
        ConfigError: There is no such file.
        StorageError: The file cannot be read.
    """
    content, what = checkpoints.read(path), f"checkpoint {path}"
    state = _tensors_of(content)
    try:
        model = recognise(state) if state else None
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    if state is None or model is None:
        return checkpoints.accept(content, what)
    return _as_checkpoint(state, model)


def _tensors_of(content: Any) -> dict[str, Tensor] | None:
    """A bare state dict, alone or as the entry ``model`` that training scripts give it."""
    if isinstance(content, Mapping) and "format" not in content:
        for state in (content, content.get("model")):
            if isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values()):
                return dict(state)
    return None


def _as_checkpoint(state: Mapping[str, Tensor], model: TorchvisionModel) -> Checkpoint:
    categories = _categories(model)
    named = "COCO's categories"
    if model.outputs != COCO_OUTPUTS or not model.detector:
        named = f"categories unknown, named {categories.names[-1]} and so on"
    return Checkpoint(
        format=checkpoints.FORMAT,
        kind="detector" if model.detector else "backbone",
        config=configs.to_plain(_config(state, model)),
        categories=categories.to_plain(),
        model=convert(state),
        provenance={
            "torchvision": f"{model.detector or 'classifier'} on {model.backbone}, "
            f"{model.outputs} outputs ({named})"
        },
    )


def _config(state: Mapping[str, Tensor], model: TorchvisionModel) -> configs.Config:
    if not model.detector:
        return configs.resolve([{"model": {"backbone": model.backbone, "norm": "bn"}}])
    recipe = configs.read_toml(configs.recipe_path(f"torchvision/{model.detector}"))
    own: dict[str, Any] = {"backbone": model.backbone}
    if any(key.endswith("num_batches_tracked") for key in state):
        own["norm_eps"] = configs.ModelConfig.norm_eps  # torch's batch norms, not the frozen ones
    return configs.resolve([recipe, {"model": own}])


def _categories(model: TorchvisionModel) -> CategoryMap:
    """Categories of the rows that are kept; ids are torchvision's labels."""
    if not model.detector:
        return CategoryMap([f"class{i}" for i in range(1, model.outputs + 1)])
    names = {i: f"class{i}" for i in range(1, model.outputs)}
    if model.outputs == COCO_OUTPUTS:
        used = (i for i in names if i not in COCO_GAPS)
        names = {i: f"unused {i}" for i in names} | dict(zip(used, COCO, strict=True))
    if model.detector == "retinanet":  # its background has a row of its own
        names = {0: "unused 0"} | names
    return CategoryMap(names.values(), names)
