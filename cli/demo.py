"""`detkit demo`: train, decompose, fine-tune, evaluate on synthetic shapes; tables, a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from detkit.cli.options import Common, common_options, emit


@click.command("demo")
@click.option(
    "--steps", type=click.IntRange(1), help="Steps of each training, to see it run in seconds."
)
@common_options()
def command(common: Common, steps: int | None) -> None:
    """The whole road on synthetic shapes, in five minutes on two CPU cores: pre-train, fine-tune
    with learnt scales, decompose them, fine-tune the plain net, evaluate it, write a report.

    \b
    Examples:
      detkit demo
      detkit demo --steps 20 --out demo
    """
    if steps:
        common = common.with_flags("train", {"steps": steps})
    if common.dry_run:
        _rehearse(common)
        return
    result = _run(common, common.layers())
    emit(common, result, lambda: _show(result))


def _rehearse(common: Common) -> None:
    from detkit.cli.rehearsal import show_demo
    from detkit.rehearsal import rehearse_demo

    found = rehearse_demo(common.layers(), out=common.out, device=common.device)
    emit(common, found, lambda: show_demo(found))


def _run(common: Common, layers: list[Any]) -> dict[str, Any]:
    from detkit import demo
    from detkit.cli.progress import TrainProgress

    with TrainProgress("demo") as progress:
        return demo.demo(layers, out=common.out, device=common.device, on_step=progress)


def _show(result: dict[str, Any]) -> None:
    from detkit.cli.tables import metrics_table, print_table, rows_table

    click.echo(f"pretrain: top-1 {result['pretrain']['metrics']['top1']:.3f} on held-out crops")
    names = ["AP", "AP50", "AP75"]
    rows: list[list[Any]] = [
        ["finetune, learnt scales", *(result["finetune"]["metrics"][n] for n in names)],
        ["decomposed, fine-tuned", *(result["fast"]["metrics"][n] for n in names)],
    ]
    print_table(rows_table("boxes on held-out images", ["net", *names], rows))
    rows = [
        [row["label"], *row["mean"], _kernels(row), row["macs_ratio"]]
        for row in result["decompose"]["layers"]
    ]
    columns = ["layer", "d_h", "d_w", "channels · kernel @ dilation", "MACs"]
    print_table(rows_table("learnt scales", columns, rows))
    print_table(metrics_table("eval: the decomposed net", result["eval"]["bbox"]))
    rows = [[name, v["AP"], v["AP50"]] for name, v in result["eval"]["per_class"].items()]
    print_table(rows_table("per class", ["class", "AP", "AP50"], rows))
    click.echo(f"picture    {Path(result['picture'])}  (truth left, predictions right)")
    if result["report"] is not None:
        click.echo(f"report     {result['report']}  (opens in any browser)")
    click.echo(f"checkpoint {result['fast']['checkpoint']}")
    click.echo(f"took       {result['seconds'] / 60:.1f} minutes")
    click.echo("next: detkit finetune --data YOUR_SET --minutes 30")


def _kernels(row: dict[str, Any]) -> str:
    from detkit.cli.decompose import part_text

    return " + ".join(part_text(part) for part in row["parts"])
