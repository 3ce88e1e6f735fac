"""Settings of a training: layers on a recipe, a checkpoint or a run to resume; what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detkit import config as configs
from detkit import foreign
from detkit.config import Config, ModelConfig, is_supernet
from detkit.engine import checkpoint as checkpoints
from detkit.engine.run import RunFolder, newest_run
from detkit.engine.summary import NUMBERS
from detkit.errors import CheckpointError, ConfigError
from detkit.loading import PIXELS, check_scales, check_supernet, net_of
from detkit.models.zoo import DETECTORS, WEIGHTS_OF, WITH_MASKS

log = logging.getLogger("detkit")
DEFAULT_EPOCHS = 12.0  # the field's "1x", where neither steps, epochs nor minutes are given
VOC_METRICS = ("voc07", "voc12")
MASK_METRICS = tuple(f"segm_{name}" for name in NUMBERS)
_SHAPE_TABLES = ("model", "anchors", "rpn", "box", "thin", "retina", "mask", "scales")
_METRICS = {"pretrain": ("top1",), "finetune": (*NUMBERS, *VOC_METRICS, *MASK_METRICS)}


def resolve_config(
    command: str,
    layers: Iterable[Mapping[str, Any]] = (),
    *,
    recipe: str | None = None,
    init_from: str | Path | None = None,
    resume: str | None = None,
) -> Config:
    """Settings of a training: what it starts from, then ``layers`` in order, last wins.

    A run to resume starts from its own settings. Else a recipe does, by default the tiny one of the
    command and the detector; a detector to start from brings its own settings unless a recipe is
    named. The architecture, and the normalisation of images, are those of ``init_from``.

    Args:
        command: ``pretrain`` or ``finetune``.
        layers: tables of settings, as a config file or ``--set`` gives them.
        recipe: name of a recipe.
        init_from: checkpoint to start from.
        resume: run to continue, or ``auto``.

    Raises:
        ConfigError: an unknown recipe, key or value.
        CheckpointError: the layers name another architecture than ``init_from`` has.
    """
    return resolve_settings(
        command, layers, recipe=recipe, init_from=init_from, resume=resume
    ).config


@dataclass(frozen=True)
class Settings:
    """Resolved settings, and by table and key where each comes from."""

    config: Config
    origins: Mapping[str, Mapping[str, str]]


def resolve_settings(
    command: str,
    layers: Iterable[Mapping[str, Any]] = (),
    *,
    recipe: str | None = None,
    init_from: str | Path | None = None,
    resume: str | None = None,
) -> Settings:
    """:func:`resolve_config`, and the origin of each value."""
    layers = list(layers)
    if resume not in (None, "auto"):
        run = resumable(str(resume))
        config = configs.resolve(layers, run.config())
        return Settings(config, configs.origins(layers, f"run {run.path}"))
    stored = foreign.load(init_from) if init_from else None
    start: list[Mapping[str, Any]] = []
    if recipe or stored is None or net_of(stored) == "backbone":
        name = recipe or _default_recipe(command, layers, stored)
        log.info("recipe %s", name)
        tables = configs.read_toml(configs.recipe_path(name))
        start.append(configs.Layer(tables, f"recipe {name}"))
        if command == "finetune":
            _tell_other_detector(name, start[0], layers)
    if stored is None:
        layers = [*start, *layers]
        return Settings(configs.resolve(layers), configs.origins(layers))
    wanted = configs.merged([*start, *layers]).model if start else None
    own = _own_settings(stored, wanted)
    layers = [*start, configs.Layer(own, f"checkpoint {init_from}"), *layers]
    config = configs.resolve(layers)
    check_scales(own["model"].get("scales", "off"), config, str(init_from))
    for key in {"backbone", "detector"} & own["model"].keys():
        got, ours = getattr(config.model, key), own["model"][key]
        if got != ours:
            raise CheckpointError(
                f"{init_from}: model.{key} must agree with the checkpoint's {ours!r}, got {got!r}"
            )
    check_supernet(stored, config, str(init_from))
    return Settings(config, configs.origins(layers))


def _tell_other_detector(
    name: str, recipe: Mapping[str, Any], layers: Iterable[Mapping[str, Any]]
) -> None:
    """Say so where the settings of a recipe go to another detector than it was written for."""
    theirs, ours = (configs.named_detector(found) for found in ([recipe], [recipe, *layers]))
    if ours != theirs and ours in DETECTORS:
        log.warning(
            "recipe %s is of %s, and its settings go to %s; `--recipe tiny/%s` is of that detector",
            name,
            theirs,
            ours,
            ours,
        )


def _default_recipe(
    command: str,
    layers: Iterable[Mapping[str, Any]],
    stored: checkpoints.Checkpoint | None,
) -> str:
    """The tiny recipe of the command, and of the detector and the kind of backbone in question."""
    layers = list(layers)
    backbone = "" if stored is None else stored["config"]["model"]["backbone"]
    for layer in layers:
        backbone = str(layer.get("model", {}).get("backbone", backbone))
    one_shot = "supernet-" if is_supernet(backbone) else ""
    if command == "pretrain":
        return f"tiny/{one_shot}pretrain"
    detector = configs.named_detector(layers)
    name = f"tiny/{one_shot}{detector}"
    if one_shot and name not in configs.recipes():
        name = f"tiny/{detector}"
    if name not in configs.recipes():
        raise ConfigError(
            f"model.detector: must be one of {', '.join(DETECTORS)}, got {detector!r}"
            f"{configs.suggest(detector, DETECTORS)}"
        )
    return name


def _own_settings(
    stored: checkpoints.Checkpoint, wanted: ModelConfig | None
) -> dict[str, dict[str, Any]]:
    """What a training takes over from its checkpoint: all without a recipe, else the shape.

    Args:
        stored: the checkpoint.
        wanted: the model that recipe and settings ask for; None without a recipe.
    """
    config = {table: dict(values) for table, values in stored["config"].items()}
    for key in ("path", "split", "val_split", "images"):
        del config["data"][key]
    if wanted is None:
        return config
    pixels = {key: config["data"][key] for key in PIXELS if key in config["data"]}
    space = {"space": config["space"]} if config.get("space", {}).get("name") else {}
    if net_of(stored) == "backbone":
        name, norm = config["model"]["backbone"], config["model"]["norm"]
        if WEIGHTS_OF.get(wanted.backbone) == name:  # its weights, dilated
            name = wanted.backbone
        shape = {"backbone": name}
        if "gn" in (norm, wanted.norm):  # batch norms, frozen or not, share their weights
            shape["norm"] = norm
        return {"model": shape, **space, "data": pixels}
    tables = {table: config[table] for table in _SHAPE_TABLES if table in config}
    if stored["kind"] == "detector":  # learners may be put into a plain net
        tables["model"]["scales"] = wanted.scales
        tables.pop("scales", None)
    return tables | space | {"data": pixels}


def newest_checkpoint(command: str, *, required: bool = True) -> str | None:
    """``best.pth``, else ``last.pth``, of the newest run under ``runs/<command>``.

    Raises:
        ConfigError: there is none and ``required``.
    """
    run = newest_run(command)
    if run is not None:
        return str(run.checkpoint())
    if required:
        raise ConfigError(
            f"checkpoint: one must be given where runs/{command} holds none, got neither; "
            f"run `detkit {command}` first"
        )
    return None


def check_metric(command: str, config: Config) -> None:
    """Refuse a metric the command will not have, before it trains; raises ConfigError."""
    metric, known = config.eval.metric, _METRICS[command]
    if metric not in known:
        raise ConfigError(
            f"eval.metric: must be one of {', '.join(known)} for {command}, got {metric!r}"
            f"{configs.suggest(metric, known)}"
        )
    if metric in MASK_METRICS and config.model.detector not in WITH_MASKS:
        raise ConfigError(
            f"eval.metric: must be one of boxes for {config.model.detector}, which gives no masks,"
            f" got {metric!r}"
        )


def with_length(config: Config) -> Config:
    """``config`` with the default length where it gives none."""
    length = config.train
    if length.steps or length.epochs or length.minutes:
        return config
    log.info("no --steps, --epochs or --minutes given: training for %g epochs", DEFAULT_EPOCHS)
    return replace(config, train=replace(length, epochs=DEFAULT_EPOCHS))


def resumable(path: str) -> RunFolder:
    """The run of a folder, or of a checkpoint in it; raises CheckpointError without last.pth."""
    run = RunFolder(Path(path).parent if Path(path).is_file() else path)
    if not run.last.is_file():
        raise CheckpointError(
            f"--resume {path}: must be a run folder with last.pth, got none there"
        )
    return run
