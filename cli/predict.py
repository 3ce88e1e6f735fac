"""`detkit predict`: what a detector finds in images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from detkit.cli.options import Common, common_options, emit, form_of, form_options
from detkit.errors import ConfigError


@click.command("predict")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option(
    "--score",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="Lowest score of a detection that is kept.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Images at once.",
)
@form_options
@common_options("--workers", "--on-bad-image")
def command(
    common: Common,
    checkpoint: Path,
    images: tuple[str, ...],
    score: float,
    batch_size: int,
    **options: bool,
) -> None:
    """Find objects in IMAGES with the detector CHECKPOINT.

    IMAGES are files, folders with all below them, and quoted patterns. Written are a picture of
    each with boxes, masks, names and scores, and detections.json in COCO's results format, whose
    ids images.json explains. Images are turned upright; those that cannot be read are named and
    left out.

    \b
    Examples:
      detkit predict runs/finetune/.../best.pth photo.jpg
      detkit predict best.pth photos --out found --score 0.5
      detkit predict best.pth "photos/**/*.jpg" --json
      detkit predict best.pth photos --fast --bf16
    """
    if common.recipe is not None:
        raise ConfigError(f"--recipe: must stand with a training, got {common.recipe!r}")
    form = form_of(options)
    if common.dry_run:
        _plan(common, checkpoint, images, {"score": score, "batch_size": batch_size, **form})
        return
    from detkit import api
    from detkit.cli.progress import image_progress

    with image_progress() as show:
        result = api.predict(
            checkpoint,
            images,
            out=common.out,
            score=score,
            batch_size=batch_size,
            device=common.device,
            overrides=common.layers(),
            form=api.Form(**form),
            on_image=show,
        )
    emit(common, result, lambda: _show(result))


def _plan(
    common: Common, checkpoint: Path, images: tuple[str, ...], options: dict[str, Any]
) -> None:
    from detkit.data.pictures import find_pictures

    paths = [str(path) for path in find_pictures(images, without=common.out)]
    plan = {"checkpoint": str(checkpoint), "images": paths, **options}

    def show() -> None:
        click.echo(f"{checkpoint} on {len(paths)} images:")
        click.echo("\n".join(paths))

    emit(common, {"dry_run": True, **plan}, show)


def _show(result: dict[str, Any]) -> None:
    from detkit.prediction import summary

    for image in result["images"]:
        click.echo(f"{image['file']}: {summary(d['name'] for d in image['detections'])}")
    images, skipped = len(result["images"]), len(result["skipped"])
    total = sum(len(image["detections"]) for image in result["images"])
    left_out = f", {skipped} left out" if skipped else ""
    click.echo(f"images {images}, detections {total}{left_out}")
    click.echo(f"pictures in {result['out']}, detections in {result['results']}")
