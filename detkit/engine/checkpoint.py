"""Checkpoints: one ``.pth`` file, enough to rebuild the model, read without running any code.

A file holds tensors and plain types only (``torch.load(weights_only=True)``). It is written to a
temporary file beside the target and renamed, so a crash leaves either the old file or the new one.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn

from detkit.config import Config, from_plain, suggest_path
from detkit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    StorageError,
)
from detkit.types import CategoryMap

FORMAT = "detkit/1"
KINDS = ("backbone", "detector", "gsl", "fd", "supernet")
_WEIGHTS = ("model", "ema", "optimizer")  # the parts that must be finite
_REQUIRED: dict[str, type] = {
    "kind": str,
    "config": dict,
    "categories": dict,
    "model": dict,
    "provenance": dict,
}


class Checkpoint(TypedDict):
    """Contents of a checkpoint.

    Attributes:
        format: ``"detkit/1"``.
        kind: One of :data:`KINDS`.
        config: The resolved config as :func:`detkit.config.to_plain` gives it.
        categories: As :meth:`CategoryMap.to_plain` gives it.
        model: State dict of the model as trained.
        ema: State dict of the averaged model; where present it is the deployed one.
        optimizer: State dict of the optimiser.
        scaler: State of the fp16 loss scaler.
        rng: ``{"ranks": [{"cpu": ByteTensor, "cuda"?: ByteTensor}]}``, one entry per process.
        progress: The fields of :class:`detkit.engine.progress.Progress`; the schedule follows from
            them.
        scales: Statistics of learnt scales: ``{"layers", "stats", "meta"}``.
        space: Of a supernet: its space, as ``SearchSpace.to_plain`` gives it.
        stage: Of a supernet: ``pretrain`` (a classifier) or ``finetune`` (a detector).
        search_split: Of a detector: which images it was trained on and which are for the search,
            as ``SearchSplit.to_plain`` gives it.
        provenance: Versions of detkit and torch and where the weights came from.
    """

    format: str
    kind: str
    config: dict[str, dict[str, Any]]
    categories: dict[str, list[Any]]
    model: dict[str, Tensor]
    ema: NotRequired[dict[str, Tensor]]
    optimizer: NotRequired[dict[str, Any]]
    scaler: NotRequired[dict[str, Any]]
    rng: NotRequired[dict[str, Any]]
    progress: NotRequired[dict[str, Any]]
    scales: NotRequired[dict[str, Any]]
    space: NotRequired[dict[str, Any]]
    stage: NotRequired[str]
    search_split: NotRequired[dict[str, Any]]
    provenance: dict[str, Any]


def save(path: str | Path, payload: Checkpoint) -> None:
    """Write ``payload`` to ``path``: the whole new file appears there, or the old one stays.

    The same payload gives the same bytes. Tensors are stored on the CPU.

    Raises:
        NonFiniteError: Weights, averaged weights or optimiser state hold NaN or infinity.
        StorageError: The disk refused; the temporary file is gone and the old file is intact.
        CheckpointError: ``payload`` is not a checkpoint.
    """
    _check_contents(payload, f"checkpoint {path}")
    plain = _plain(payload, "checkpoint")
    _check_finite(plain, path)
    buffer = io.BytesIO()  # in memory first: saving to a path writes the file's stem into the bytes
    torch.save(plain, buffer)
    _replace(Path(os.path.realpath(path)), buffer.getbuffer())


def _replace(target: Path, content: memoryview) -> None:
    """Put ``content`` at ``target`` in one step that survives a crash or a power cut."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_directory(target.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"checkpoint {target}: must be writable, got {error.strerror or error}"
        ) from error


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # the rename itself is only durable once the directory is
    finally:
        os.close(handle)


def _plain(value: Any, where: str) -> Any:
    """``value`` with plain dicts, lists and compact CPU tensors; TypeError for anything else."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        # A view would drag its whole storage into the file.
        compact = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if compact else tensor.clone()
    if isinstance(value, Mapping):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where}: must be a tensor or a plain type, got {type(value).__name__}")


def _check_finite(payload: Mapping[str, Any], path: str | Path) -> None:
    for part in _WEIGHTS:
        for name, tensor in _tensors(payload.get(part), part):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"checkpoint {path}: weights must be finite, got NaN or infinity in {name}; "
                    "nothing was written"
                )


def _tensors(value: Any, where: str) -> Iterable[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{where}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{where}[{i}]")


def load(path: str | Path, *, kinds: Iterable[str] = KINDS) -> Checkpoint:
    """Read a checkpoint onto the CPU; nothing in the file is executed.

    Args:
        path: The file.
        kinds: The kinds the caller can use.

    Raises:
        CheckpointError: Damaged, foreign, or of another kind.
        ConfigError: There is no such file.
        StorageError: The file cannot be read.
    """
    return accept(read(path), f"checkpoint {path}", kinds)


def accept(content: Any, what: str, kinds: Iterable[str] = KINDS) -> Checkpoint:
    """``content`` of a file that :func:`read` gave, if it is a checkpoint.

    Raises:
        CheckpointError: It is none, or of another kind; ``what`` opens the message.
    """
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{what}: must be a {FORMAT} file, got {_describe(content)}")
    _check_contents(content, what)
    kinds = tuple(kinds)
    if content["kind"] not in kinds:
        raise CheckpointError(
            f"{what}: must be of kind {' or '.join(kinds)}, got {content['kind']!r}"
        )
    return cast(Checkpoint, content)


def read(path: str | Path) -> Any:
    """Read any ``.pth`` file of tensors and plain types onto the CPU; nothing in it is executed.

    Raises:
        CheckpointError: Damaged, or it holds anything but tensors and plain types.
        ConfigError: There is no such file.
        StorageError: The file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"checkpoint {path}: must be an existing file, got {_what_is_at(path)}"
            f"{suggest_path(path)}"
        )
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise StorageError(
            f"checkpoint {path}: must be readable, got {error.strerror or error}"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles, which are refused below
            _check_sums(content)
            return torch.load(content, map_location="cpu", weights_only=True)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    except Exception as error:  # damaged bytes surface as almost any type, OSError too
        raise CheckpointError(f"checkpoint {path}: {_reason(error)}") from error


def _what_is_at(path: Path) -> str:
    """What stands in place of a checkpoint; of a run folder also the file that was meant."""
    if not path.is_dir():
        return "nothing there"
    meant = [path / name for name in ("best.pth", "last.pth") if (path / name).is_file()]
    return f"a folder; give {meant[0]}" if meant else "a folder"


def _check_sums(file: io.BytesIO) -> None:
    """Compare the archive's checksums, which torch's own reader skips."""
    if zipfile.is_zipfile(file):
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(
                f"must be an undamaged file, got a wrong checksum in its record {damaged}"
            )
    file.seek(0)


def _reason(error: Exception) -> str:
    refused = re.search(r"unsupported (?:global: )?GLOBAL (\S+)", str(error), re.IGNORECASE)
    if refused:
        return f"must hold tensors and plain types only, got a pickled {refused[1]} (not loaded)"
    return (
        "must be a complete .pth file of tensors and plain types, "
        "got a truncated, damaged or foreign one"
    )


def _describe(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    keys = ", ".join(str(key) for key in list(content)[:3])
    return f"a dict without a format (its keys: {keys}{', …' if len(content) > 3 else ''})"


def _check_contents(content: Mapping[str, Any], what: str) -> None:
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{what}: format must be {FORMAT!r}, got {content.get('format')!r}; "
            "a newer detkit may have written it"
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(content.get(key), kind):
            raise CheckpointError(
                f"{what}: must have {key!r} as a {kind.__name__}, "
                f"got {type(content.get(key)).__name__}"
            )
    if content["kind"] not in KINDS:
        raise CheckpointError(
            f"{what}: kind must be one of {', '.join(KINDS)}, got {content['kind']!r}"
        )
    for part in ("model", "ema"):
        for name, value in content.get(part, {}).items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{what}: {part} must hold tensors, got {type(value).__name__} in {name}"
                )


def deployed(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights to use: the averaged ones where there are any, else the trained ones."""
    return checkpoint["ema"] if "ema" in checkpoint else checkpoint["model"]


def load_weights(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load ``state`` into ``model``; CheckpointError unless every key and shape fits."""
    check_weights(model.state_dict(), state, what)
    model.load_state_dict(dict(state))


def check_weights(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Compare ``state`` with a model's ``own`` state dict.

    Raises:
        CheckpointError: Keys are missing or left over, or shapes differ; names the first of each.
    """
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    found = (("missing", missing), ("left over", unknown), ("of another shape", shapes))
    differences = [f"{len(names)} {how} (first: {names[0]})" for how, names in found if names]
    if differences:
        raise CheckpointError(f"{what}: weights must fit the model, got {', '.join(differences)}")


def config_of(checkpoint: Checkpoint) -> Config:
    """The config that built the model; raises CheckpointError where this detkit cannot read it."""
    try:
        return from_plain(checkpoint["config"])
    except ConfigError as error:
        raise CheckpointError(f"checkpoint config: {error}") from error


def categories_of(checkpoint: Checkpoint) -> CategoryMap:
    """The categories the model tells apart; raises CheckpointError where they are malformed."""
    try:
        return CategoryMap.from_plain(checkpoint["categories"])
    except (DataError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint categories: must be names with ids, got {checkpoint['categories']}"
        ) from error
