"""Settings of the images."""

from __future__ import annotations

from dataclasses import dataclass

from detkit.config.checks import one_of, positive, require, share, zero_or_more


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how they reach the network."""

    path: str = "synthetic"
    """Folder or file of a data set in any layout detkit reads, or `synthetic`."""
    split: str = "train"
    """Split trained on (`detkit eval` takes its own, `val` by default)."""
    val_split: str = "val"
    """Split evaluated on while training."""
    images: str = ""
    """Image folder, where an annotation file stands alone."""
    short_side: int = 800
    """Detectors: the shorter side after resizing; classifiers: the side of the square crop."""
    long_side: int = 1333
    """Detectors: upper limit of the longer side."""
    train_long_side: int = 0
    """The same when training; 0 takes long_side."""
    multi_scale: tuple[int, ...] = ()
    """Shorter sides to draw from when training; empty for short_side alone."""
    flip: float = 0.5
    """Chance of a horizontal flip when training."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter when training."""
    lighting: float = 0.0
    """Deviation of AlexNet's colour noise along ImageNet's principal colours when training."""
    skip_empty: bool = False
    """Detectors: leave images without an object (crowds do not count) out of training."""
    min_crop: float = 1.0
    """Detectors: smallest share of each side kept by a random crop when training (1 turns it off);
    classifiers: smallest share of the area kept."""
    eval_crop: float = 0.875
    """Classifiers: side of the central square evaluated on, as a share of the shorter side."""
    workers: int = 2
    """Loader processes."""
    on_bad_image: str = "skip"
    """Unusable files: skip them and list them, or fail."""
    max_pixels: int = 178_956_970
    """Images with more pixels than this count as unusable (decompression bombs)."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """RGB mean subtracted from images in 0..1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """RGB deviation images are divided by (1/255 leaves values in 0..255)."""
    channels: str = "rgb"
    """Order in which the network gets red, green and blue: rgb or bgr."""
    resize: str = "antialias"
    """Detectors: antialias (bilinear, as wide as the step when shrinking), or torchvision (its
    detectors' own: pixels are normalised first, bilinear without antialias, sides rounded down)."""
    pad_multiple: int = 32
    """Batches are padded to a multiple of this many pixels."""

    def __post_init__(self) -> None:
        one_of("data.on_bad_image", self.on_bad_image, ("skip", "fail"))
        one_of("data.resize", self.resize, ("antialias", "torchvision"))
        one_of("data.channels", self.channels, ("rgb", "bgr"))
        zero_or_more(self, "data", "train_long_side")
        share(self, "data", "flip")
        zero_or_more(self, "data", "lighting")
        require(0 < self.min_crop <= 1, "data.min_crop", "in (0, 1]", self.min_crop)
        require(0 < self.eval_crop <= 1, "data.eval_crop", "in (0, 1]", self.eval_crop)
        require(
            len(self.mean) == len(self.std) == 3,
            "data.mean and data.std",
            "three numbers",
            self.mean,
        )
        require(all(s > 0 for s in self.std), "data.std", "positive", self.std)
        positive(self, "data", "short_side")
        require(
            self.long_side >= self.short_side,
            "data.long_side",
            "at least data.short_side",
            self.long_side,
        )
        require(
            all(s > 0 for s in self.multi_scale), "data.multi_scale", "positive", self.multi_scale
        )
        zero_or_more(self, "data", "workers")
        positive(self, "data", "pad_multiple", "max_pixels")
