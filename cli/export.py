"""`detkit export`: a detector as an ONNX file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from detkit.cli.options import Common, common_options, emit, height_by_width
from detkit.errors import ConfigError

log = logging.getLogger("detkit")


@click.command("export")
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "onnx",
    type=click.Path(path_type=Path),
    metavar="FILE.onnx",
    help="The file to write.  [default: the checkpoint's name, with .onnx]",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Compare with PyTorch on 20 images of the data set; a difference writes nothing.",
)
@click.option("--opset", type=int, help="Version of ONNX's operators.  [default: 18]")
@click.option("--size", metavar="HxW", help="Fix the size of the images; free by default.")
@click.option("--data", metavar="PATH", help="Data set to verify on; by default the checkpoint's.")
@click.option("--split", default="val", show_default=True, help="Its split.")
@common_options("--workers")
def command(
    common: Common,
    checkpoint: Path | None,
    onnx: Path | None,
    size: str | None,
    **options: Any,
) -> None:
    """Write CHECKPOINT, by default the newest detector run, as an ONNX file.

    Raw images go in, detections come out: normalisation and suppression are inside. Only standard
    operators are used; batch, height and width are free.

    \b
    Examples:
      detkit export
      detkit export runs/finetune/.../best.pth -o detector.onnx --verify
      detkit export best.pth -o fixed.onnx --size 800x1344
    """
    from detkit import api

    if common.device not in ("auto", "cpu"):
        raise ConfigError(f"--device: must be cpu to export, got {common.device!r}")
    if common.recipe is not None:
        raise ConfigError(f"--recipe: must stand with a training, got {common.recipe!r}")
    if onnx is not None and common.out is not None:
        raise ConfigError("-o: must stand without --out, got both")
    if checkpoint is None:
        checkpoint = Path(str(api.newest_checkpoint("finetune")))
        log.info("using %s", checkpoint)
    target = onnx or (common.out or checkpoint.parent) / f"{checkpoint.stem}.onnx"
    options["size"] = height_by_width(size)
    if common.dry_run:
        plan = {"checkpoint": str(checkpoint), "onnx": str(target), **options}
        emit(common, {"dry_run": True, **plan}, lambda: click.echo(plan))
        return
    result = api.export(checkpoint, target, overrides=common.layers(), **options)
    emit(common, result, lambda: _show(result))


def _show(result: dict[str, Any]) -> None:
    click.echo(f"{result['onnx']}: {result['bytes'] / 1e6:.1f} MB, opset {result['opset']}")
    found = result["verified"]
    if found:
        masks = f", {found['mask']:.1e} in masks" if found["mask"] else ""
        click.echo(
            f"verified on {found['images']} images, {found['detections']} detections: within "
            f"{found['box']:.1e} pixels, {found['score']:.1e} in scores{masks}"
        )
