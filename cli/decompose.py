"""`detkit decompose`: learnt scales to plain convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from detkit.cli.options import Common, common_options, emit
from detkit.errors import ConfigError

WEIGHTS_HELP = (
    "transfer: cut those of the learnt net; FILE: those of a backbone; none: start afresh."
)


@click.command("decompose")
@click.argument("checkpoint", metavar="GSL.PTH", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: GSL-fd.pth]"
)
@click.option(
    "--tol",
    type=float,
    default=0.05,
    show_default=True,
    help="Distance to a whole number up to which a scale counts as whole.",
)
@click.option(
    "--align",
    type=int,
    default=1,
    show_default=True,
    help="Split at multiples of so many channels; 8 suits fp16 and bf16.",
)
@click.option(
    "--ways",
    type=int,
    default=2,
    show_default=True,
    help="Most convolutions per layer: 2 as in the paper; 3 or 4 keep more of the density.",
)
@click.option(
    "--zero-dilation",
    type=click.Choice(["center", "sum"]),
    default="center",
    show_default=True,
    help="Weights of a kernel side of 1: the middle tap (the paper's) or the sum of the three.",
)
@click.option(
    "--weights",
    metavar="transfer|none|FILE",
    default="transfer",
    show_default=True,
    help=WEIGHTS_HELP,
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Draw the scales of the layers.",
)
@common_options()
def command(
    common: Common, checkpoint: Path, output: Path | None, plot: Path | None, **options: Any
) -> None:
    """Turn a detector trained with --scales learn into one of plain convolutions.

    Each layer at its mean scale becomes one or two convolutions at whole dilations on disjoint
    output channels (POD). Fine-tune the result with `detkit finetune --init-from`.

    \b
    Examples:
      detkit decompose runs/finetune/.../best.pth -o fd.pth
      detkit decompose gsl.pth --align 8 --plot scales.png
      detkit decompose gsl.pth --dry-run --json
    """
    _refuse(common)
    if common.out is not None:
        if output is not None:
            raise ConfigError("-o: must stand without --out, got both")
        output = common.out / f"{checkpoint.stem}-fd.pth"
    from detkit import pod

    if plot is not None:
        _check_plot(plot)
    if common.out is not None and not common.dry_run:
        common.out.mkdir(parents=True, exist_ok=True)
    how = pod.Decomposition(**options, seed=common.seed)
    result = pod.decompose(checkpoint, output, options=how, dry_run=common.dry_run)
    drawn = {} if plot is None or common.dry_run else {"plot": str(plot)}
    if drawn:
        _draw(checkpoint, result, Path(drawn["plot"]))
    emit(common, result | drawn, lambda: _show(result | drawn))


def _refuse(common: Common) -> None:
    """Settings change no plan: all is in the checkpoint."""
    given = {
        "--recipe": common.recipe,
        "--config": common.config_file,
        "--set": common.overrides,
    }
    for name, value in given.items():
        if value:
            raise ConfigError(
                f"{name}: must not be given to decompose, whose settings are in the checkpoint, "
                f"got {value if isinstance(value, str) else name}"
            )
    if common.device not in ("auto", "cpu"):
        raise ConfigError(f"--device: must be auto or cpu for decompose, got {common.device!r}")


def _check_plot(plot: Path) -> None:
    """Refuse what could not be drawn at the end, before the work is done."""
    if plot.suffix not in (".png", ".svg", ".pdf") or not plot.parent.is_dir():
        raise ConfigError(
            f"--plot: must be a .png, .svg or .pdf file in a folder that exists, got {plot}"
        )
    from detkit.report.analysis import require_matplotlib

    require_matplotlib("--plot")


def _draw(checkpoint: Path, result: dict[str, Any], plot: Path) -> None:
    from detkit.report.analysis import save_figure
    from detkit.report.scales import draw_scales

    run = checkpoint.resolve().parent.name
    name = f"{run}/{checkpoint.name}" if checkpoint.stem in ("best", "last") else checkpoint.name
    save_figure(draw_scales({name: result["layers"]}), plot)


def _show(result: dict[str, Any]) -> None:
    from detkit.cli.tables import print_table, rows_table

    more = any(len(row["parts"]) > 2 for row in result["layers"])
    columns = ["layer", "C → O", "s", "d_h", "d_w", "std/mean", "case", "lower"]
    columns += [*(["between"] if more else []), "upper", "α", "α got", "MACs", "density"]
    rows = [_row(layer, more) for layer in result["layers"]]
    print_table(rows_table("scales decomposed", columns, rows))
    click.echo("lower, upper: output channels · kernel @ dilation; MACs: of the 3x3 convolution;")
    click.echo("α: share of upper, wanted and got; density: total variation distance;")
    click.echo("!: a scale that varies by more than 3 % over images")
    for layer in result["layers"]:
        click.echo(f"{layer['label']:6} {layer['path']}")
    _show_totals(result["totals"])
    for warning in result["warnings"]:
        click.echo(f"warning: {warning}")
    for key in ("output", "plot"):
        if result.get(key):
            click.echo(f"{key:10} {result[key]}")
    if result["output"]:
        click.echo(f"next: detkit finetune --init-from {result['output']}")


def _row(layer: dict[str, Any], more: bool) -> list[Any]:
    mean, std = layer["mean"], layer["std"]
    ratio = max(s / m for s, m in zip(std, mean, strict=True))
    scales = [f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, std, strict=True)]
    parts = [part_text(part) for part in layer["parts"]]
    between = [" + ".join(parts[1:-1]) or "-"] if more else []
    return [
        layer["label"],
        "{} → {}".format(*layer["channels"]),
        str(layer["stride"][0]),
        *scales,
        f"{ratio:.1%}" + ("!" if ratio > 0.03 else ""),
        layer["case"],
        parts[0],
        *between,
        parts[-1] if len(parts) > 1 else "-",
        f"{layer['alpha']:.3f}",
        f"{layer['alpha_realised']:.3f}",
        f"{layer['macs_ratio']:.3f}",
        f"{layer['density_distance']:.3f}",
    ]


def part_text(part: dict[str, Any]) -> str:
    """``51·3x3@1x2``: 51 output channels of 3x3 kernels at dilation (1, 2)."""
    kernel, dilation = ("{}x{}".format(*part[key]) for key in ("kernel", "dilation"))
    return f"{part['channels']}·{kernel}@{dilation}"


def _show_totals(totals: dict[str, Any]) -> None:
    size = "x".join(str(n) for n in totals["image"])
    before, after = totals["detector"]["params"]
    click.echo(f"detector   {before:,} -> {after:,} parameters")
    before, after = (n / 1e9 for n in totals["detector"]["macs"])
    click.echo(f"           {before:.3f} -> {after:.3f} GMACs for one image of {size}")
    before, after = (n / 1e9 for n in totals["macs"])
    click.echo(f"layers     {before:.3f} -> {after:.3f} GMACs")
    counts = f"{totals['single']} single, {totals['split']} split"
    click.echo(f"           {counts}, largest dilation {totals['largest_dilation']}")
