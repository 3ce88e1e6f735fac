"""Models from settings and from checkpoint files, scale learners and split layers included."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from detkit import deploy, foreign
from detkit.config import Config, from_plain, resolve, to_plain
from detkit.engine import checkpoint as checkpoints
from detkit.engine.checkpoint import Checkpoint
from detkit.errors import CheckpointError, ConfigError
from detkit.models import build_classifier, build_detector
from detkit.models.backbones.shuffle_supernet import extract
from detkit.models.search_space import SearchSpace, network_tables
from detkit.models.weights import init_backbone, init_detector
from detkit.models.zoo import supernet_space
from detkit.nas.split import SearchSplit
from detkit.scales import insert, rebuild
from detkit.types import CategoryMap

if TYPE_CHECKING:
    from detkit.data.pictures import Picture
    from detkit.prediction import Prediction

log = logging.getLogger("detkit")

KINDS = {"off": "detector", "learn": "gsl", "split": "fd"}
"""Kind of a detector's checkpoint, by ``model.scales``."""

PIXELS = ("mean", "std", "channels")
"""Settings of ``data`` that say what the numbers of an image mean to a network."""

Layers = Sequence[Mapping[str, Any]]
"""How the layers of a fast-deployment net are split, as ``Plan.to_plain`` writes them."""


@dataclass(frozen=True)
class Loaded:
    """A model rebuilt from one checkpoint file, in eval mode, with what it was built from."""

    model: nn.Module
    config: Config
    categories: CategoryMap
    kind: str
    space: SearchSpace | None = None
    """Of a supernet: its space; a path must be set before the model runs."""
    stage: str = ""
    """Of a supernet: ``pretrain`` (a classifier) or ``finetune`` (a detector)."""
    search_split: SearchSplit | None = None
    """Of a detector on a supernet: the images it was trained on, and those for the search."""

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
        kind: ``backbone`` for a classifier, anything else for a detector.
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
    path: str | Path,
    device: str = "cpu",
    overrides: Iterable[Mapping[str, Any]] = (),
    *,
    fast: bool = False,
    bf16: bool = False,
    compile: bool = False,
    cuda_graph: bool = False,
) -> Loaded:
    """Rebuild the model of a checkpoint with its deployed weights (EMA where there is one).

    Args:
        path: the checkpoint.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>``.
        overrides: layers of settings on top of the checkpoint's.
        fast: give the model the form that detects fastest (:func:`detkit.deploy.fast`); boxes and
            scores are the same up to rounding. The last two imply it.
        bf16: run the layers in bfloat16.
        compile: detect through ``torch.compile``; each shape of a batch takes a minute or more on
            its first call, and what cannot be compiled raises ConfigError.
        cuda_graph: detect by CUDA graphs, one for each shape of a batch.

    Raises:
        CheckpointError: the file is no detkit checkpoint, or its weights do not fit the model.
        ConfigError: an unknown setting or device; a form the model or the device does not go with.
    """
    form = deploy.Form(fast=fast, bf16=bf16, compile=compile, cuda_graph=cuda_graph)
    stored = foreign.load(path)
    _tell_origin(stored, str(path))
    loaded = restore(stored, str(path), pick_device(device), overrides)
    return in_form(loaded, form)


def in_form(loaded: Loaded, form: deploy.Form) -> Loaded:
    """``loaded`` made ready to detect; raises ConfigError as :meth:`detkit.deploy.Form.apply`."""
    if form == deploy.Form():
        return loaded
    if loaded.kind == "supernet":
        raise ConfigError(
            "load: fast must go with a single network, got a supernet, whose batch norms are each "
            "path's own"
        )
    return replace(loaded, model=form.apply(loaded.model))


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
    check_supernet(stored, config, name)
    model = build(config, categories, net_of(stored), fixed_layers(stored))
    checkpoints.load_weights(model, checkpoints.deployed(stored), name)
    model = model.to(device).eval()
    if kind != "supernet":
        return Loaded(model, config, categories, kind)
    split = search_split_of(stored)
    return Loaded(model, config, categories, kind, supernet_space(config), stored["stage"], split)


def net_of(stored: Checkpoint) -> str:
    """``backbone`` for the checkpoint of a classifier, ``detector`` for that of any detector."""
    classifier = stored["kind"] == "backbone" or stored.get("stage") == "pretrain"
    return "backbone" if classifier else "detector"


def search_split_of(stored: Checkpoint) -> SearchSplit | None:
    """Which images a detector on a supernet was trained on, None for other checkpoints.

    Raises:
        CheckpointError: The entry is malformed.
    """
    plain = stored.get("search_split")
    return None if plain is None else SearchSplit.from_plain(plain)


def check_supernet(stored: Checkpoint, config: Config, name: str) -> None:
    """Refuse settings under which the weights of a supernet would mean something else.

    Nothing in the shapes tells the order of the colours or their scale, or how channels are
    shuffled, and a supernet used otherwise than it was trained finds next to nothing.

    Args:
        stored: A checkpoint of any kind; only a supernet's is looked at.
        config: The settings it shall be used with.
        name: Its file.

    Raises:
        CheckpointError: Another space, order of blocks, shuffle or input; or the file lacks what
            tells them.
    """
    if stored["kind"] != "supernet":
        return
    try:
        theirs = SearchSpace.from_plain(stored["space"])
        stage = stored["stage"]
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name}: a supernet must say its space and stage, got {type(error).__name__}: {error}"
        ) from error
    if stage not in ("pretrain", "finetune"):
        raise CheckpointError(f"{name}: stage must be pretrain or finetune, got {stage!r}")
    ours = supernet_space(config)
    if ours != theirs:
        different = [
            f"{key} {value!r} for {plain[key]!r}"
            for plain in [theirs.to_plain()]
            for key, value in (ours.to_plain() if ours else {}).items()
            if value != plain[key]
        ]
        raise CheckpointError(
            f"{name}: the search space must be the supernet's own {theirs.name!r}, got "
            f"{', '.join(different) or config.model.backbone}"
        )
    data = checkpoints.config_of(stored).data
    for key in PIXELS:
        if getattr(config.data, key) != getattr(data, key):
            raise CheckpointError(
                f"{name}: data.{key} must be as the supernet was trained, {getattr(data, key)!r}, "
                f"got {getattr(config.data, key)!r}"
            )


def path_checkpoint(
    stored: Checkpoint, genes: Sequence[int], norms: Mapping[str, Tensor] | None = None
) -> Checkpoint:
    """One path of a supernet as a plain checkpoint, of a backbone or of a detector.

    Args:
        stored: The supernet's checkpoint.
        genes: The path.
        norms: Statistics of the path's batch norms, as :func:`detkit.nas.calibrate.calibrate` gives
            them; without them the path keeps the supernet's, which mix all paths.

    Raises:
        CheckpointError: No supernet's checkpoint.
        ConfigError: Genes that are not of its space.
        ValueError: A statistic that the supernet has no norm for.
    """
    if stored["kind"] != "supernet":
        raise CheckpointError(f"checkpoint: must be of kind 'supernet', got {stored['kind']!r}")
    config = checkpoints.config_of(stored)
    check_supernet(stored, config, "checkpoint")
    space = SearchSpace.from_plain(stored["space"])
    state = dict(checkpoints.deployed(stored))
    for key, value in (norms or {}).items():
        if key not in state:
            raise ValueError(f"norms: must be of norms of the supernet, got {key}")
        state[key] = value.cpu()
    plain = to_plain(config)
    plain["nas"], plain["space"] = to_plain(Config())["nas"], to_plain(Config())["space"]
    for table, values in network_tables(space, genes).items():
        plain[table] |= values
    return Checkpoint(
        format=checkpoints.FORMAT,
        kind=net_of(stored),
        config=plain,
        categories=stored["categories"],
        model=extract(state, space, genes),
        provenance={**stored["provenance"], "path": space.text(genes)},
    )


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
        kind: ``backbone`` for a classifier, anything else for a detector.
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
        _initialise(model, config, source, name, categories, allow_partial)
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
    config: Config,
    stored: Checkpoint,
    name: str,
    categories: CategoryMap,
    allow_partial: bool,
) -> None:
    _tell_origin(stored, name)
    state = checkpoints.deployed(stored)
    check_supernet(stored, config, name)
    if net_of(stored) == "backbone":
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
