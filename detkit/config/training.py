"""Settings of a training: length, optimiser, evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from detkit.config.checks import one_of, positive, require, zero_or_more

LENGTHS = ("steps", "epochs", "minutes")
"""Settings of ``train`` of which at most one is set."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how many at once, in which precision; the schedule scales to the length given."""

    steps: int = 0
    """Optimiser steps; at most one of steps, epochs and minutes is set."""
    epochs: float = 0.0
    """Passes over the training split."""
    minutes: float = 0.0
    """Wall minutes of the training loop."""
    batch_size: int = 16
    """Images per optimiser step over all processes."""
    accumulate: int = 1
    """Parts each process splits its share of the batch into."""
    amp: str = "off"
    """Mixed precision: off, bf16, fp16, or auto (bf16 where the hardware has it)."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights, per step; 0 turns it off."""
    clip: float = 0.0
    """Largest gradient norm; 0 turns clipping off."""
    label_smoothing: float = 0.0
    """Classifiers: share of the target spread over all classes."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    stall_seconds: float = 600.0
    """Stop with exit 7 when no step has finished for this long."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between writes of last.pth."""
    tensorboard: bool = False
    """Write the lines of metrics.jsonl as TensorBoard's event files too (extra [tensorboard])."""

    def __post_init__(self) -> None:
        one_of("train.amp", self.amp, ("off", "auto", "bf16", "fp16"))
        given = [k for k in LENGTHS if getattr(self, k)]
        require(len(given) <= 1, "train", "given one of steps, epochs and minutes", given)
        zero_or_more(self, "train", *LENGTHS, "clip", "label_smoothing")
        positive(
            self, "train", "batch_size", "accumulate", "log_every", "save_every", "stall_seconds"
        )
        require(0 <= self.ema < 1, "train.ema", "in [0, 1)", self.ema)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    name: str = "sgd"
    """sgd or adamw."""
    lr: float = 0.02
    """Learning rate for 16 images per step; the rate used is lr * batch_size / 16."""
    momentum: float = 0.9
    """Momentum of SGD, first beta of AdamW."""
    nesterov: bool = False
    """Nesterov momentum (SGD)."""
    weight_decay: float = 1e-4
    """Weight decay."""
    norm_decay: bool = True
    """Decay norm weights and biases too; false leaves the weights of more than one dimension."""
    bias_decay: bool = True
    """Decay biases, those of norms among them; norm_decay = false decays none of them."""
    bias_lr_factor: float = 1.0
    """Learning-rate factor of biases."""
    warmup_steps: int = 500
    """Steps of linear warm-up, at most a tenth of the schedule."""
    warmup_factor: float = 1 / 3
    """Share of the learning rate at the first step."""
    schedule: str = "step"
    """step, cosine, or linear to 0."""
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    """Shares of the schedule after which the rate is multiplied by gamma."""
    gamma: float = 0.1
    """Factor at each milestone."""

    def __post_init__(self) -> None:
        one_of("optim.name", self.name, ("sgd", "adamw"))
        one_of("optim.schedule", self.schedule, ("step", "cosine", "linear"))
        zero_or_more(self, "optim", "lr", "weight_decay", "warmup_steps")
        require(0 < self.warmup_factor <= 1, "optim.warmup_factor", "in (0, 1]", self.warmup_factor)
        require(
            all(0 < m < 1 for m in self.milestones),
            "optim.milestones",
            "shares in (0, 1)",
            self.milestones,
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation while training."""

    every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    metric: str = "AP"
    """What `best.pth` is best at: AP, AP50, voc07, voc12, segm_AP for detectors; else top1."""
    patience: int = 0
    """Stop after this many evaluations without a better metric; 0 never stops early."""

    def __post_init__(self) -> None:
        zero_or_more(self, "eval", "every", "patience")
