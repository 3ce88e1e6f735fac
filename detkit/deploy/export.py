"""A detector as an ONNX file: raw images in, detections out, standard operators only."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from detkit import __version__
from detkit.config import DataConfig
from detkit.deploy import metadata
from detkit.deploy.dense import DenseDetector
from detkit.deploy.fold import fold
from detkit.deploy.onnx_ops import translations
from detkit.errors import ConfigError
from detkit.scales import to_plain

INPUTS = ("images", "sizes")
OPSETS = (18, 23)
"""Lowest and highest version of ONNX's operators that can be asked for."""

_AXES = {0: "batch", 2: "height", 3: "width"}
_EXAMPLE = (192, 256)  # pixels of the images that the graph is traced with


def require_onnx() -> None:
    """Raises ConfigError unless the packages of the extra ``onnx`` are installed."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"export: {package} must be installed, got none; run `pip install detkit[onnx]`"
            )


def to_onnx(
    model: nn.Module,
    data: DataConfig,
    *,
    opset: int = OPSETS[0],
    size: tuple[int, int] | None = None,
    entries: Mapping[str, str] | None = None,
) -> bytes:
    """``model`` as an ONNX file with normalisation and suppression inside, batch norms folded.

    Args:
        model: A detector; left as it is.
        data: Normalisation and padding of its images.
        opset: Version of ONNX's operators.
        size: Height and width of the images, fixed; None leaves them free. The batch is always
            free.
        entries: Metadata of the file, as :func:`detkit.deploy.metadata.describe` gives.

    Raises:
        CheckpointError: The model holds scale learners.
        ConfigError: A part of it cannot be exported, ``opset`` is out of range or a package is
            missing.
    """
    require_onnx()
    import onnx

    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ConfigError(f"--opset: must be in {OPSETS[0]}..{OPSETS[1]}, got {opset}")
    dense = DenseDetector(to_plain(fold(model)).cpu().float(), data).eval()
    made = _traced(dense, opset, size)
    made.producer_name, made.producer_version = "detkit", __version__
    metadata.put(made, entries or {})
    onnx.checker.check_model(made)
    content: bytes = made.SerializeToString()
    return content


def _traced(dense: DenseDetector, opset: int, size: tuple[int, int] | None) -> Any:
    """The ``onnx.ModelProto`` of ``dense``."""
    height, width = size or _EXAMPLE
    images = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    sizes = torch.tensor([[height, width]] * 2)
    auto = torch.export.Dim.AUTO  # named ones are refused where a map could have a single cell
    free = {0: auto} if size else {0: auto, 2: auto, 3: auto}
    with torch.no_grad(), _quiet():
        exported = torch.export.export(
            dense, (images, sizes), dynamic_shapes=(free, {0: auto}), strict=False
        )
        program: Any = torch.onnx.export(
            exported,
            input_names=list(INPUTS),
            output_names=dense.outputs,
            opset_version=opset,
            dynamo=True,
            custom_translation_table=translations(),
            verbose=False,
        )
    return _named(program.model_proto, free)


def _named(model: Any, free: Iterable[int]) -> Any:
    """``model`` with the free dimensions of its images called batch, height and width."""
    shape = model.graph.input[0].type.tensor_type.shape.dim
    fixed = [_AXES[axis] for axis in free if not shape[axis].dim_param]
    if fixed:
        raise RuntimeError(f"export: the traced graph must be free in {', '.join(fixed)}")
    names = {shape[axis].dim_param: _AXES[axis] for axis in free}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own remarks; what it refuses is an exception."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
