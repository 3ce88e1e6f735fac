"""`detkit eval`: score a detector, or a file of detections."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from detkit.cli.options import Common, common_options, emit, form_of, form_options
from detkit.errors import ConfigError

_COCO_TREE = """annotations/instances_train2017.json
annotations/instances_val2017.json
train2017/*.jpg
val2017/*.jpg"""

log = logging.getLogger("detkit")


@click.command("eval")
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option(
    "--coco", is_flag=False, flag_value="", default=None, metavar="[DIR]", help="COCO 2017 folder."
)
@click.option(
    "--data", metavar="PATH", help="Data set; by default the one the checkpoint was trained on."
)
@click.option("--split", default="val", show_default=True, help="Split to score on.")
@click.option("--images", default="", help="Image folder, where an annotation file stands alone.")
@click.option(
    "--detections", type=click.Path(path_type=Path), help="COCO results file to score; no model."
)
@click.option(
    "--save-detections", type=click.Path(path_type=Path), help="Write the detections here."
)
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    help="Two run folders, checkpoints or results files: both scores and how sure B - A is.",
)
@click.option(
    "--resamples",
    type=click.IntRange(1),
    help="With --compare: bootstrap draws of the images.  [default: 1000]",
)
@click.option(
    "--fold", is_flag=True, help="Fold the batch norms into the convolutions, as for deployment."
)
@click.option("--analysis", is_flag=True, help="Also AP and AR by IoU and area.")
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="With --analysis or --compare: draw AP and AR over IoU, by area.",
)
@click.option(
    "--metric",
    type=click.Choice(["coco", "voc07", "voc12"]),
    default="coco",
    show_default=True,
    help="COCO's metrics, or VOC mAP by 11 points (voc07) or by area (voc12).",
)
@form_options
@common_options("--workers", "--on-bad-image")
def command(
    common: Common,
    checkpoint: Path | None,
    coco: str | None,
    data: str | None,
    split: str,
    images: str,
    compare: tuple[str, str] | None,
    resamples: int | None,
    picture: Path | None,
    **options: Any,
) -> None:
    """Score CHECKPOINT, by default the newest detector run, on a data set.

    \b
    Examples:
      detkit eval
      detkit eval runs/finetune/.../best.pth --data cells --json
      detkit eval best.pth --coco /sets/coco --analysis
      detkit eval best.pth --data cells --fast --bf16
      detkit eval --detections results.json --data cells --metric voc07
      detkit eval --compare runs/finetune/one runs/finetune/other --data cells
    """
    if resamples is not None and compare is None:
        raise ConfigError("--resamples: must go with --compare, got it alone")
    if picture is not None:
        _check_picture(picture, options, compare)
    if coco is not None and coco.endswith(".pth") and checkpoint is None:
        checkpoint, coco = (
            Path(coco),
            "",
        )  # `--coco best.pth`: the value was meant as the checkpoint
    path = data if coco is None else _coco_folder(coco)
    if images:
        common = common.with_flags("data", {"images": images})
    overrides = common.layers()
    if compare is not None:
        _refuse_beside_compare(checkpoint, options)
        place: dict[str, Any] = {"data": path, "split": split}
        draws = {"resamples": resamples or 1000, "seed": common.seed or 0}
        place["analysis"] = options["analysis"] or picture is not None
        place["fold"] = options["fold"]
        _compare(common, compare, overrides, place | draws, picture)
        return
    if checkpoint is None and options["detections"] is None:
        from detkit import api

        checkpoint = Path(str(api.newest_checkpoint("finetune")))
        log.info("using %s", checkpoint)
    if common.dry_run:
        plan = {"checkpoint": str(checkpoint), "data": path, "split": split, **_plain(options)}
        plan |= _drawn(picture)
        emit(common, {"dry_run": True, **plan}, lambda: click.echo(plan))
        return
    result = _evaluate(common, checkpoint, path, split, overrides, options)
    if picture is not None:
        _draw({str(checkpoint or options["detections"]): result}, picture)
    emit(common, result | _drawn(picture), lambda: _show(result))


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}


def _check_picture(picture: Path, options: dict[str, Any], compare: object) -> None:
    """Refuse what could not be drawn at the end, before the work is done."""
    if not (options["analysis"] or compare):
        raise ConfigError("--picture: must go with --analysis or --compare, got neither")
    if options["metric"] != "coco":
        raise ConfigError(f"--picture: must go with --metric coco, got {options['metric']!r}")
    if picture.suffix not in (".png", ".svg", ".pdf") or not picture.parent.is_dir():
        raise ConfigError(
            f"--picture: must be a .png, .svg or .pdf file in a folder that exists, got {picture}"
        )
    from detkit.report.analysis import require_matplotlib

    require_matplotlib()


def _drawn(picture: Path | None) -> dict[str, str]:
    return {} if picture is None else {"picture": str(picture)}


def _draw(results: dict[str, dict[str, Any]], picture: Path) -> None:
    from detkit.report.analysis import draw_analysis, save_figure

    analyses = {_short(name): result["analysis"] for name, result in results.items()}
    images = next(iter(results.values()))["images"]
    save_figure(draw_analysis(analyses, note=f"{images} images"), picture)


def _short(name: str, most: int = 48) -> str:
    """A run's name for its checkpoints, else the file's name; long ones lose their middle."""
    prefix, _, given = name.rpartition("=")
    path = Path(given)
    text = path.parent.name if path.name in ("best.pth", "last.pth") else path.name
    text = prefix + (text or given)
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"


def _evaluate(
    common: Common,
    checkpoint: Path | None,
    path: str | None,
    split: str,
    overrides: list[Mapping[str, Any]],
    options: dict[str, Any],
) -> dict[str, Any]:
    detections, form = options["detections"], form_of(options)
    model_wanted = options["fold"] or any(form.values())  # `api` refuses these
    if detections is not None and not model_wanted:  # without torch
        from detkit.scoring import score_file

        place: dict[str, Any] = {"data": path, "split": split, "overrides": overrides}
        what = {key: options[key] for key in ("analysis", "metric")}
        return score_file(detections, **place, **what)
    from detkit import api
    from detkit.cli.progress import image_progress

    with image_progress() as show:
        return api.evaluate(
            checkpoint,
            data=path,
            split=split,
            overrides=overrides,
            device=common.device,
            on_image=show,
            form=api.Form(**form),
            **options,
        )


def _refuse_beside_compare(checkpoint: Path | None, options: dict[str, Any]) -> None:
    given = {
        "a checkpoint": checkpoint,
        "--detections": options["detections"],
        "--save-detections": options["save_detections"],
        f"--metric {options['metric']}": options["metric"] != "coco",
        "--fast, --bf16, --compile and --cuda-graph": any(form_of(options).values()),
    }
    for name, value in given.items():
        if value:
            raise ConfigError(f"--compare: must stand without {name}, got both")


def _compare(
    common: Common,
    pair: tuple[str, str],
    overrides: list[Mapping[str, Any]],
    options: dict[str, Any],
    picture: Path | None,
) -> None:
    if common.dry_run:
        plan = {"compare": list(pair), **options, **_drawn(picture)}
        emit(common, {"dry_run": True, **plan}, lambda: click.echo(plan))
        return
    from detkit.cli.progress import image_progress
    from detkit.comparison import compare

    with image_progress() as show:
        result = compare(*pair, overrides=overrides, device=common.device, on_image=show, **options)
    if picture is not None:
        named = zip(("A: ", "B: "), pair, (result["a"], result["b"]), strict=True)
        _draw({f"{side}={given}": scores for side, given, scores in named}, picture)
    emit(common, result | _drawn(picture), lambda: _show_comparison(result, pair))


def _coco_folder(value: str) -> str:
    folder = value or os.environ.get("DETKIT_COCO") or "data/coco"
    if not Path(folder).exists():
        tree = "\n  ".join(_COCO_TREE.splitlines())
        raise ConfigError(
            f"--coco: must be a folder with the COCO 2017 layout, got {folder!r}, not there;"
            f" give --coco DIR or set DETKIT_COCO to a folder with\n  {tree}"
        )
    return folder


def _show_comparison(result: dict[str, Any], pair: tuple[str, str]) -> None:
    from detkit.cli.tables import print_table, rows_table

    for name, given in zip("AB", pair, strict=True):
        click.echo(f"{name} = {given}")
    columns = ["A", "B", "B - A", "95 % interval"]
    difference = result["difference"]
    for kind in ("bbox", "segm"):
        if kind in difference:
            rows = [
                [metric, result["a"][kind][metric], result["b"][kind][metric], *_interval(spread)]
                for metric, spread in difference[kind].items()
            ]
            print_table(rows_table(kind, ["metric", *columns], rows))
    rows = [
        [name, *(result[s]["per_class"][name]["AP"] for s in "ab"), *_interval(spread["AP"])]
        for name, spread in difference["per_class"].items()
    ]
    print_table(rows_table("AP per class", ["class", *columns], rows))
    _show_analysis({"A ": result["a"], "B ": result["b"]})
    draws = f"{result['resamples']} draws of {result['images']} images, seed {result['seed']}"
    click.echo(f"interval: bootstrap over images, the same for A and B; {draws}")
    for name in "ab":
        _show_normalised(result[name], f"{name.upper()} ")


def _interval(spread: dict[str, Any]) -> list[str | None]:
    """Difference and limits with their signs."""
    if spread["value"] is None:
        return [None, None]
    value, low, high = (f"{spread[key]:+.3f}" for key in ("value", "low", "high"))
    return [value, f"{low} … {high}"]


def _show_analysis(results: dict[str, dict[str, Any]]) -> None:
    """One table per quantity; rows are area by area, those of the results side by side."""
    from detkit.cli.tables import print_table, rows_table
    from detkit.engine.analysis import PAPER_COLUMNS

    tables = {name: result.get("analysis", {}) for name, result in results.items()}
    for quantity, areas in next(iter(tables.values())).items():
        rows = [
            [f"{name}{area}", *(table[quantity][area][iou] for iou in PAPER_COLUMNS)]
            for area in areas
            for name, table in tables.items()
        ]
        print_table(rows_table(f"{quantity} by area and IoU", ["area", *PAPER_COLUMNS], rows))


def _show_normalised(result: dict[str, Any], name: str = "") -> None:
    for line in result.get("normalised", []):
        click.echo(f"{name}normalised: {line}")


def _show(result: dict[str, Any]) -> None:
    from detkit.cli.tables import metrics_table, print_table, rows_table

    for title in ("bbox", "segm", "voc07", "voc12"):
        if title in result:
            print_table(metrics_table(title, result[title]))
    per_class = result["per_class"]
    columns = list(next(iter(per_class.values()), {}))
    rows = [[name, *values.values()] for name, values in per_class.items()]
    print_table(rows_table("per class", ["class", *columns], rows))
    _show_analysis({"": result})
    click.echo(f"{result['images']} images, {result['detections']} detections")
    _show_normalised(result)
