"""The forms a model can detect in: exact, folded and channels last, bf16, compiled, CUDA graphs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detkit.deploy.compiled import Run, compiled
from detkit.deploy.fast import fast
from detkit.deploy.fixed import FixedDetector, Found
from detkit.deploy.graphs import CudaGraphs
from detkit.errors import ConfigError
from detkit.models.detector import OneStageDetector, TwoStageDetector, in_output_pixels
from detkit.types import Detections


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a model is made ready to detect; as it is by default.

    Attributes:
        fast: Batch norms folded, weights channels last (:func:`detkit.deploy.fast`); boxes and
            scores are the same up to rounding. The last three imply it.
        bf16: Layers in bfloat16 by autocast.
        fixed: In fixed sizes (:class:`FixedDetector`), as the last two need it. No gain alone, but
            it tells what they pay for it.
        compile: Through ``torch.compile``; each shape of a batch is compiled on its first call,
            for a minute or more on a CPU.
        cuda_graph: By CUDA graphs, one for each shape of a batch.
    """

    fast: bool = False
    bf16: bool = False
    fixed: bool = False
    compile: bool = False
    cuda_graph: bool = False

    def apply(self, model: nn.Module) -> nn.Module:
        """``model`` in this form, in eval mode: itself where nothing is asked for, else a copy.

        Raises:
            ConfigError: No detector where more than ``fast`` is asked for; a device, or a detector
                with scale learners, that does not go with the form.
        """
        if self.fast or self.in_fixed_sizes:
            model = fast(model)
        if not (self.bf16 or self.in_fixed_sizes):
            return model
        if not isinstance(model, TwoStageDetector | OneStageDetector):
            raise ConfigError(
                "--bf16, --compile, --cuda-graph: must go with a detector, got "
                f"{type(model).__name__}"
            )
        return DeployedDetector(model, self).eval()

    @property
    def in_fixed_sizes(self) -> bool:
        """Whether ``fixed`` or a form that needs it is asked for."""
        return self.fixed or self.compile or self.cuda_graph


class DeployedDetector(nn.Module):
    """A detector whose ``detect`` runs in another form.

    Args:
        detector: Already folded where that is wanted.
        form: Precision, compiler and graphs.

    Raises:
        ConfigError: See :meth:`Form.apply`.
    """

    def __init__(self, detector: TwoStageDetector | OneStageDetector, form: Form) -> None:
        super().__init__()
        self.detector = detector
        self._form = form
        self._run = _fixed(detector, form) if form.in_fixed_sizes else None

    @torch.no_grad()
    def detect(
        self, images: Tensor, sizes: Tensor, output_sizes: Tensor | None = None
    ) -> list[Detections]:
        """As the detector's own ``detect``.

        Images whose detections fixed sizes cannot hold (``Found.complete``) are detected again
        without them.
        """
        with self._precision(images.device.type):
            if self._run is None:
                return self.detector.detect(images, sizes, output_sizes)
            found = self._run(images, sizes.to(images.device))
            counts, complete = torch.stack([found.counts, found.complete.long()]).tolist()
            if not all(complete):
                return self.detector.detect(images, sizes, output_sizes)
        small, cells = _cut(found, counts)
        if isinstance(self.detector, OneStageDetector):
            return in_output_pixels(small, sizes, output_sizes)
        return self.detector.placed(small, cells, images, sizes, output_sizes)

    def _precision(self, device: str) -> torch.autocast | nullcontext[None]:
        if not self._form.bf16:
            return nullcontext()
        # A cache would keep weights cast in one graph's memory for the next.
        return torch.autocast(device, torch.bfloat16, cache_enabled=not self._form.cuda_graph)


def _fixed(detector: TwoStageDetector | OneStageDetector, form: Form) -> Run:
    """Detection in fixed sizes, compiled and in graphs as asked for."""
    device = next(detector.parameters()).device
    if form.cuda_graph and device.type != "cuda":
        raise ConfigError(
            f"--cuda-graph: must go with a model on a CUDA device, got {device}; leave it out there"
        )
    run: Run = FixedDetector(detector).forward
    if form.compile:
        run = compiled(run)
    return CudaGraphs(run) if form.cuda_graph else run


def _cut(found: Found, counts: list[int]) -> tuple[list[Detections], list[Tensor]]:
    """Detections of each image, and its cells, copied out of the fixed rows."""
    small = [
        Detections(
            boxes=found.boxes[i, :k].clone(),
            labels=found.labels[i, :k].clone(),
            scores=found.scores[i, :k].clone(),
        )
        for i, k in enumerate(counts)
    ]
    if found.cells is None:
        return small, []
    return small, [found.cells[i, :k].clone() for i, k in enumerate(counts)]
