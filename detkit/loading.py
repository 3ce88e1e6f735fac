"""Models from settings and from checkpoint files, scale learners and split layers included."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from detkit import foreign
from detkit.config import Config, from_plain, resolve
from detkit.engine import checkpoint as checkpoints
from detkit.engine.checkpoint import Checkpoint
from detkit.errors import CheckpointError, ConfigError
from detkit.models import build_classifier, build_detector
from detkit.models.weights import init_backbone, init_detector
from detkit.scales import insert, rebuild
from detkit.types import CategoryMap

if TYPE_CHECKING:
    from detkit.data.pictures import Picture
    from detkit.prediction import Prediction

log = logging.getLogger("detkit")

KINDS = {"off": "detector", "learn": "gsl", "split": "fd"}
"""Kind of a detector's checkpoint, by ``model.scales``."""

Layers = Sequence[Mapping[str, Any]]
"""How the layers of a fast-deployment net are split, as ``Plan.to_plain`` writes them."""


@dataclass(frozen=True)
class Loaded:
    """A model rebuilt from one checkpoint file, in eval mode, with what it was built from."""

    model: nn.Module
    config: Config
    categories: CategoryMap
    kind: str

    @overload
    def predict(
        self,
        images: list[Picture] | tuple[Picture, ...],
        *,
        score: float = ...,
        batch_size: int = ...,
    ) -> list[Prediction]: ...

    @overload
    def predict(
        self, images: Picture, *, score: float = ..., batch_size: int = ...
    ) -> Prediction: ...

    def predict(
        self,
        images: Picture | list[Picture] | tuple[Picture, ...],
        *,
        score: float | None = None,
        batch_size: int = 1,
    ) -> Prediction | list[Prediction]:
        """Detect objects in an image, or in each of a list.

        Args:
            images: A file, a PIL image or a uint8 array (H, W, 3) in RGB order; or a list of them.
                Files and PIL images are turned as EXIF says.
            score: Lowest score of a detection that is kept; 0.3 by default.
            batch_size: Images at once. Images of one batch are padded to a common size, which can
                change detections slightly.

        Returns:
            One prediction, or a list of as many as there are images.

        Raises:
            CheckpointError: The model is no detector.
            DataError: An image cannot be read.
            ConfigError: ``score`` or ``batch_size`` is out of range.
        """
        from detkit import prediction

        prediction.require_detector(self.kind, "model.predict")
        least = prediction.SCORE if score is None else score
        if isinstance(images, list | tuple):
            return prediction.predict_pictures(self, images, least, batch_size)
        return prediction.predict_pictures(self, [images], least, batch_size)[0]


def build(
    config: Config,
    categories: CategoryMap | int,
    kind: str = "detector",
    layers: Layers | None = None,
) -> nn.Module:
    """A freshly initialised detector, or classifier for ``kind="backbone"``.

    Args:
        config: the resolved settings; ``model.scales`` tells what the 3x3 convolutions become.
        categories: the category map, or the number of classes K.
        kind: kind of its checkpoints.
        layers: the split layers of a fast-deployment net.

    Raises:
        ConfigError: an unknown name, or settings that do not fit together.
        CheckpointError: ``layers`` do not fit the model.
    """
    return _put_scales(_plain(config, categories, kind), config, layers)


def _plain(config: Config, categories: CategoryMap | int, kind: str) -> nn.Module:
    count = categories if isinstance(categories, int) else len(categories)
    if kind != "backbone":
        return build_detector(config, count)
    if config.model.scales != "off":
        raise ConfigError(
            f"model.scales: must be 'off' for a classifier, got {config.model.scales!r}; "
            "`detkit finetune` learns scales"
        )
    return build_classifier(config, count)


def _put_scales(model: nn.Module, config: Config, layers: Layers | None) -> nn.Module:
    """Replace the 3x3 convolutions of ``model`` as ``model.scales`` asks."""
    if config.model.scales == "learn":
        wanted = config.scales
        try:
            insert(
                model,
                map=wanted.map,
                init=wanted.init,
                scale_group=wanted.group,
                max_scale=wanted.max or None,
            )
        except (ConfigError, ValueError) as error:
            raise ConfigError(
                f"model.scales: must be 'off' for {config.model.detector} on "
                f"{config.model.backbone}, got 'learn': {error}"
            ) from error
    elif config.model.scales == "split":
        if layers is None:
            raise ConfigError(
                "model.scales: must be off or learn where no fast-deployment net is started from, "
                "got 'split'; `detkit decompose` makes such a net, --init-from takes it"
            )
        rebuild(model, layers)
    return model


def fixed_layers(stored: Checkpoint | None) -> Layers | None:
    """The split layers of a fast-deployment net's checkpoint; None for other kinds.

    Raises:
        CheckpointError: they are missing.
    """
    if stored is None or stored["kind"] != "fd":
        return None
    layers = stored.get("scales", {}).get("layers")
    if not isinstance(layers, list) or not layers:
        raise CheckpointError(
            f"checkpoint of kind 'fd': must list its layers under scales.layers, got {layers!r}"
        )
    return layers


def load(
    path: str | Path, device: str = "cpu", overrides: Iterable[Mapping[str, Any]] = ()
) -> Loaded:
    """Rebuild the model of a checkpoint with its deployed weights (EMA where there is one).

    Args:
        path: the checkpoint.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        overrides: layers of settings on top of the checkpoint's.

    Raises:
        CheckpointError: the file is no detkit checkpoint, or its weights do not fit the model.
        ConfigError: an unknown setting or device.
    """
    stored = foreign.load(path)
    _tell_origin(stored, str(path))
    return restore(stored, str(path), pick_device(device), overrides)


def restore(
    stored: Checkpoint,
    name: str,
    device: torch.device | str = "cpu",
    overrides: Iterable[Mapping[str, Any]] = (),
) -> Loaded:
    """The model of a checkpoint that was read from the file ``name``."""
    config = resolve(overrides, from_plain(stored["config"]))
    categories = CategoryMap.from_plain(stored["categories"])
    kind, scales = stored["kind"], config.model.scales
    if kind in KINDS.values() and kind != KINDS[scales]:
        raise CheckpointError(
            f"{name}: kind must be {KINDS[scales]!r} for model.scales = {scales!r}, got {kind!r}"
        )
    model = build(config, categories, kind, fixed_layers(stored))
    checkpoints.load_weights(model, checkpoints.deployed(stored), name)
    return Loaded(model.to(device).eval(), config, categories, kind)


def starting_model(
    config: Config,
    categories: CategoryMap,
    kind: str,
    *,
    layers: Layers | None = None,
    source: Checkpoint | None = None,
    name: str = "",
    allow_partial: bool = False,
) -> nn.Module:
    """A model to train, with the weights of ``source`` where it is given.

    Args:
        config: the resolved settings.
        categories: of the data to train on.
        kind: kind of its checkpoints.
        layers: the split layers of a fast-deployment net.
        source: checkpoint to start from, of any kind.
        name: its file, for messages.
        allow_partial: accept missing and left-over weights of ``source``.
    """
    model = _plain(config, categories, kind)
    # A plain net's weights fit the plain net: what learners add starts afresh.
    plain = source is not None and source["kind"] not in ("gsl", "fd")
    if not plain:
        _put_scales(model, config, layers)
    if source is not None:
        _initialise(model, source, name, categories, allow_partial)
    return _put_scales(model, config, layers) if plain else model


def check_scales(stored: str, config: Config, name: str) -> None:
    """Refuse settings whose ``model.scales`` the net to start from cannot have.

    Args:
        stored: ``model.scales`` of the checkpoint.
        config: the resolved settings.
        name: the checkpoint's file.

    Raises:
        CheckpointError: learners or split layers would have to go.
    """
    wanted = config.model.scales
    reasons = {
        "learn": "its 3x3 convolutions sample at scales they predict; "
        f"`detkit decompose {name}` makes a net of plain convolutions",
        "split": "its 3x3 convolutions are split at fixed dilations",
    }
    if stored in reasons and wanted != stored:
        raise CheckpointError(
            f"{name}: model.scales must be {stored!r} as in the checkpoint, got {wanted!r}; "
            f"{reasons[stored]}"
        )


def _initialise(
    model: nn.Module,
    stored: Checkpoint,
    name: str,
    categories: CategoryMap,
    allow_partial: bool,
) -> None:
    _tell_origin(stored, name)
    state = checkpoints.deployed(stored)
    if stored["kind"] == "backbone":
        report = init_backbone(model, state, name, allow_partial=allow_partial)
    else:
        theirs = CategoryMap.from_plain(stored["categories"])
        report = init_detector(
            model, state, name, theirs=theirs, ours=categories, allow_partial=allow_partial
        )
    log.info("%s: %s", name, report)


def _tell_origin(stored: Checkpoint, name: str) -> None:
    if "torchvision" in stored["provenance"]:
        log.info("%s: torchvision's %s", name, stored["provenance"]["torchvision"])


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the process's own GPU where there is one, else the CPU.

    Raises:
        ConfigError: an unknown name, or a GPU that is not there.
    """
    if name == "auto":
        index = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index_text = name.partition(":")
    if kind not in ("cpu", "cuda") or not (index_text.isdecimal() or name == kind):
        raise ConfigError(f"--device: must be auto, cpu, cuda or cuda:<index>, got {name!r}")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index_text or 0) >= count:
        raise ConfigError(
            f"--device: {name} must be a GPU torch can use, got {count}; see `detkit doctor`"
        )
    return torch.device(name)
