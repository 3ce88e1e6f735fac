"""POD: learn a global scale per layer, decompose it, ship plain convolutions (Peng et al., 2019).

:func:`insert` puts learners into any model; :mod:`collect` measures what they learnt over images;
:func:`plan` turns the means into whole dilations; :func:`apply` puts plain convolutions in their
place, :func:`rebuild` does so from a checkpoint's list, :func:`to_plain` leaves PyTorch alone.
"""

from detkit.scales.collect import ScaleStatistics, recording, weights_hash
from detkit.scales.decompose import LayerPlan, Part, Plan, plan
from detkit.scales.insert import ScaleLayer, insert, layers_of
from detkit.scales.learner import (
    FixedScaleConv2d,
    GlobalScaleConv2d,
    follow_pooler,
    images_of_rows,
    latest_scales,
    learners,
)
from detkit.scales.split import SplitConv2d, apply, freeze, rebuild, to_plain

__all__ = [
    "FixedScaleConv2d",
    "GlobalScaleConv2d",
    "LayerPlan",
    "Part",
    "Plan",
    "ScaleLayer",
    "ScaleStatistics",
    "SplitConv2d",
    "apply",
    "follow_pooler",
    "freeze",
    "images_of_rows",
    "insert",
    "latest_scales",
    "layers_of",
    "learners",
    "plan",
    "rebuild",
    "recording",
    "to_plain",
    "weights_hash",
]
