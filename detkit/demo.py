"""`detkit demo`: all of the road, small, on data made on the spot."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detkit import config as configs
from detkit import pod
from detkit.api import evaluate, resolve_config, train
from detkit.data import open_detection
from detkit.engine import checkpoint as checkpoints
from detkit.engine.train import StepInfo
from detkit.errors import ConfigError
from detkit.report.analysis import require_matplotlib
from detkit.report.figures import draw_predictions, grid
from detkit.reporting import write_report

log = logging.getLogger("detkit")


def demo(
    layers: Iterable[Mapping[str, Any]] = (),
    *,
    out: str | Path | None = None,
    device: str = "auto",
    on_step: Callable[[StepInfo], None] | None = None,
) -> dict[str, Any]:
    """All of the road on synthetic shapes: pre-train, fine-tune with learnt scales, decompose,
    fine-tune the plain net, evaluate, draw predictions beside the truth, report.

    Args:
        layers: settings on top of the demo's recipes.
        out: folder for the runs and the picture; by default a new one under ``runs/demo``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        on_step: called after each training step.

    Returns:
        ``{"pretrain", "finetune", "fast"}`` as :func:`detkit.api.train` gives them,
        ``"decompose"`` as :func:`detkit.pod.decompose` does, ``"eval"`` as
        :func:`detkit.api.evaluate` does, ``"picture"``, ``"report"`` (None without matplotlib)
        and ``"seconds"``.
    """
    begun = time.monotonic()
    layers = list(layers)
    folder = Path(out) if out else Path("runs/demo") / time.strftime("%Y%m%d-%H%M%S")
    result: dict[str, Any] = {}
    first: str | None = None
    for part in ("pretrain", "finetune", "fast"):
        command = "pretrain" if part == "pretrain" else "finetune"
        if part == "fast":
            result["decompose"] = pod.decompose(str(first), folder / "fd.pth")
            first = result["decompose"]["output"]
        config = resolve_config(command, layers, recipe=f"demo/{part}", init_from=first)
        result[part] = train(
            command, config, out=folder / part, device=device, init_from=first, on_step=on_step
        )
        first = result[part]["checkpoint"]
    checkpoint = result["fast"]["checkpoint"]
    detections = folder / "detections.json"
    result["eval"] = evaluate(checkpoint, device=device, save_detections=detections)
    result["picture"] = str(_draw(checkpoint, detections, folder / "predictions.png"))
    result["report"] = _report([folder / part for part in ("fast", "finetune", "pretrain")], device)
    return result | {"seconds": time.monotonic() - begun}


def _report(runs: Sequence[Path], device: str) -> str | None:
    """The page of all three trainings, in the folder they are in; None without matplotlib."""
    try:
        require_matplotlib("detkit report")
    except ConfigError as error:  # what the demo is about has been done
        log.warning("no report is written: %s", error)
        return None
    target = runs[0].parent / "report.html"
    return str(write_report(runs, output=target, device=device)["report"])


def _draw(checkpoint: str, detections: Path, target: Path, images: int = 4) -> Path:
    """Truth and predictions of a few validation images, the ones with the most objects."""
    stored = checkpoints.load(checkpoint)
    config = configs.from_plain(stored["config"])
    dataset = open_detection(config.data.path, config.data.val_split, config.data)
    truth = dataset.truth()
    rows = json.loads(detections.read_text(encoding="utf-8"))
    names = {c["id"]: c["name"] for c in truth["categories"]}
    objects: dict[Any, list[dict[str, Any]]] = {i: [] for i in dataset.image_ids}
    for annotation in truth["annotations"]:
        annotation.pop("segmentation", None)  # boxes beside boxes: masks would tint one side only
        objects[annotation["image_id"]].append(annotation)
    chosen = sorted(range(len(dataset)), key=lambda i: -len(objects[dataset.image_ids[i]]))[:images]
    pictures = []
    for index in chosen:
        image_id = dataset.image_ids[index]
        found = [row for row in rows if row["image_id"] == image_id]
        pictures.append(draw_predictions(dataset.image(index), found, objects[image_id], names))
    grid(pictures).save(target)
    return target
