"""Parts that several detectors are built from, as the configuration says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detkit.config import Config
from detkit.errors import ConfigError
from detkit.models.anchors import AnchorGrid
from detkit.models.heads.box import BoxPredictor, ConvBoxPredictor
from detkit.models.heads.roi import Align, RoiPool, RoiPooler
from detkit.models.heads.rpn import RPN, RpnHead
from detkit.types import FeatureSpec


def pyramid_sizes(config: Config, levels: Sequence[str]) -> list[tuple[float, ...]]:
    """Anchor sides of each level of a pyramid.

    Raises:
        ConfigError: Not one side per level, nor as many on each.
    """
    sizes, octave = config.anchors.sizes, config.anchors.octave_scales
    each, rest = divmod(len(sizes), len(levels))
    if rest or not each:
        raise ConfigError(
            f"anchors.sizes: must be one side for each of {', '.join(levels)}, or as many for each,"
            f" level by level, got {list(sizes)}"
        )
    sides = [side * 2 ** (i / octave) for side in sizes for i in range(octave)]
    per_level = each * octave
    return [tuple(sides[i : i + per_level]) for i in range(0, len(sides), per_level)]


def anchor_grid(
    config: Config, specs: Mapping[str, FeatureSpec], sizes: Sequence[Sequence[float]]
) -> AnchorGrid:
    """Anchors of the maps ``specs``, with the sides ``sizes`` on each."""
    anchors = config.anchors
    strides = [spec.stride for spec in specs.values()]
    return AnchorGrid(strides, sizes, anchors.ratios, anchors.style, anchors.measured_strides)


def cell_sizes(config: Config) -> tuple[float, ...]:
    """Anchor sides in each cell of a detector with one level."""
    octave = config.anchors.octave_scales
    return tuple(side * 2 ** (i / octave) for side in config.anchors.sizes for i in range(octave))


def region_proposals(
    config: Config, specs: Mapping[str, FeatureSpec], sizes: Sequence[Sequence[float]]
) -> RPN:
    """Region proposal network with one head over the maps ``specs``, which share their channels.

    Args:
        config: Tables anchors and rpn are used.
        specs: Maps used, by name, finest first.
        sizes: Anchor sides of each map.
    """
    grid = anchor_grid(config, specs, sizes)
    cin = next(iter(specs.values())).channels
    channels = config.rpn.channels or cin
    head = RpnHead(cin, channels, grid.per_cell[0], config.rpn.softmax)
    return RPN(head, grid, list(specs), config.rpn)


def pyramid_pooler(
    config: Config, specs: Mapping[str, FeatureSpec], pool: RoiPool | None = None
) -> RoiPooler:
    """Pooling from the levels of a pyramid up to ``box.roi_max_level``, RoIAlign unless given."""
    box = config.box
    used = {name: spec for name, spec in specs.items() if int(name[1:]) <= box.roi_max_level}
    pool = pool or Align(box.resolution, box.sampling_ratio, box.aligned)
    return RoiPooler(used, pool, box.canonical_size)


def box_predictor(
    config: Config, pooler: RoiPooler, num_classes: int
) -> BoxPredictor | ConvBoxPredictor:
    """Classes and boxes of RoIs by the layers that ``box.head`` names.

    Raises:
        ConfigError: They have no width.
    """
    channels, height, width = pooler.out_shape
    box, norm = config.box, config.model.head_norm
    if not box.channels:
        raise ConfigError(f"box.channels: must be positive for {config.model.detector}, got 0")
    if box.head == "4conv1fc":
        shape = channels, height, width
        return ConvBoxPredictor(shape, box.channels, num_classes, box.class_agnostic, norm)
    return BoxPredictor(
        channels * height * width, box.channels, num_classes, box.class_agnostic, norm
    )
