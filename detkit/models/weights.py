"""Starting weights from a checkpoint: a backbone's fill the backbone, a detector's all of the net.

Layers shaped by the classes keep the rows of every category whose name both sides know; the other
rows stay freshly initialised. Any other missing or left-over weight is refused, never skipped in
silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from detkit.errors import CheckpointError
from detkit.types import CategoryMap

_COUNTER = "num_batches_tracked"  # kept by some norms and not by others; never a weight


class ClassRows(NamedTuple):
    """Which rows of a layer belong to which class; modules name their class-shaped layers in an
    attribute ``class_rows``: ``{"classes": ClassRows(1, 1)}``.

    Attributes:
        before: Rows before those of the first class.
        each: Rows per class.
        groups: How often all of that repeats, one group after the other.
    """

    before: int
    each: int
    groups: int = 1


@dataclass(frozen=True)
class InitReport:
    """What `--init-from` did.

    Attributes:
        loaded: weights copied whole.
        kept: categories whose rows of the class-shaped layers were copied.
        fresh: categories that start from random rows.
        missing: weights of the model the checkpoint lacks (only with ``allow_partial``).
        unused: weights of the checkpoint the model lacks: a classifier's last layer, others only
            with ``allow_partial``.
    """

    loaded: int
    kept: tuple[str, ...]
    fresh: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.loaded} weights loaded"]
        if self.kept or self.fresh:
            parts.append(f"classes kept: {', '.join(self.kept) or 'none'}")
            parts.append(f"classes started afresh: {', '.join(self.fresh) or 'none'}")
        parts += [f"missing: {', '.join(self.missing)}"] if self.missing else []
        parts += [f"unused: {', '.join(self.unused)}"] if self.unused else []
        return "; ".join(parts)


def init_backbone(
    model: nn.Module, state: Mapping[str, Tensor], source: str, *, allow_partial: bool = False
) -> InitReport:
    """Fill ``model.backbone``, and the layers that a head took over from it (its
    ``backbone_layers``), from a classifier's state dict; the other layers stay as they are.

    The classifier's own last layers, ``tail`` and ``fc``, are not used, whatever its classes.

    Raises:
        CheckpointError: weights are missing, left over or differently shaped.
    """
    own = model.state_dict()
    wanted = _weights(own, "backbone.")
    for path, child in _backbone_layers(model):
        moved = _weights(own, f"{path}.{child}.")
        wanted |= {f"backbone.{k.removeprefix(path + '.')}": v for k, v in moved.items()}
    last = (*_weights(state, "tail."), *_weights(state, "fc."))
    given = {key: value for key, value in _weights(state).items() if key not in last}
    report = _copy(wanted, given, source, (), (), allow_partial)
    return replace(report, unused=(*report.unused, *last))


def init_detector(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    theirs: CategoryMap,
    ours: CategoryMap,
    allow_partial: bool = False,
) -> InitReport:
    """Fill a detector from another one's state dict, class-shaped layers by category name.

    Args:
        model: the detector to fill.
        state: weights of a detector of the same architecture.
        source: the file's name, for messages.
        theirs: categories of ``state``.
        ours: categories of ``model``.
        allow_partial: accept missing and left-over weights.

    Raises:
        CheckpointError: weights are missing, left over or differently shaped.
    """
    wanted, given = _weights(model.state_dict()), _weights(state)
    kept = tuple(name for name in ours.names if name in theirs.names)
    fresh = tuple(name for name in ours.names if name not in theirs.names)
    for path, rows in _class_layers(model).items():
        for part in ("weight", "bias"):
            key = f"{path}.{part}"
            if key in wanted and key in given:
                _check_rows(key, wanted[key], given[key], rows, theirs, source)
                _copy_rows(wanted.pop(key), given.pop(key), rows, theirs, ours, kept)
    return _copy(wanted, given, source, kept, fresh, allow_partial)


def _backbone_layers(model: nn.Module) -> list[tuple[str, str]]:
    """Path of each module that took over layers of the backbone, and the name of each layer."""
    return [
        (path, child)
        for path, module in model.named_modules()
        for child in getattr(module, "backbone_layers", ())
    ]


def _class_layers(model: nn.Module) -> dict[str, ClassRows]:
    """Rows of each class-shaped layer, by its path."""
    return {
        f"{path}.{child}" if path else child: rows
        for path, module in model.named_modules()
        for child, rows in getattr(module, "class_rows", {}).items()
    }


def _check_rows(
    key: str, target: Tensor, source: Tensor, rows: ClassRows, theirs: CategoryMap, file: str
) -> None:
    shape = (rows.groups * (rows.before + rows.each * len(theirs)), *target.shape[1:])
    if source.shape != shape:
        raise CheckpointError(
            f"{file}: {key} must have shape {shape} for its {len(theirs)} categories, "
            f"got {tuple(source.shape)}"
        )


def _copy_rows(
    target: Tensor,
    source: Tensor,
    rows: ClassRows,
    theirs: CategoryMap,
    ours: CategoryMap,
    kept: tuple[str, ...],
) -> None:
    if not kept:
        return
    target, source = (t.unflatten(0, (rows.groups, -1)) for t in (target, source))  # views
    target[:, : rows.before] = source[:, : rows.before]
    for name in kept:
        to, origin = (rows.before + m.names.index(name) * rows.each for m in (ours, theirs))
        target[:, to : to + rows.each] = source[:, origin : origin + rows.each]


def _weights(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k.startswith(prefix) and not k.endswith(_COUNTER)}


def _copy(
    wanted: dict[str, Tensor],
    given: dict[str, Tensor],
    source: str,
    kept: tuple[str, ...],
    fresh: tuple[str, ...],
    allow_partial: bool,
) -> InitReport:
    for key in wanted.keys() & given.keys():
        if wanted[key].shape != given[key].shape:
            raise CheckpointError(
                f"{source}: {key} must have shape {tuple(wanted[key].shape)}, "
                f"got {tuple(given[key].shape)}"
            )
    missing = tuple(k for k in wanted if k not in given)
    unused = tuple(k for k in given if k not in wanted)
    if (missing or unused) and not allow_partial:
        raise CheckpointError(
            f"{source}: must have just the weights of the model, got {len(missing)} missing"
            f" ({_few(missing)}) and {len(unused)} left over ({_few(unused)});"
            " --allow-partial loads the rest"
        )
    for key in wanted.keys() & given.keys():
        wanted[key].copy_(given[key])
    return InitReport(len(wanted.keys() & given.keys()), kept, fresh, missing, unused)


def _few(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:3]) or "none"
    return f"{shown}, …" if len(names) > 3 else shown
