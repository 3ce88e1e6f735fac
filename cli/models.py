"""`detkit models`: every backbone, detector and recipe."""

from __future__ import annotations

from typing import Any

import click

from detkit.cli.options import Common, common_options, emit, height_by_width


@click.command("models")
@click.option(
    "--size", metavar="HxW", help="Count whole detectors on an image of this size, e.g. 800x1344."
)
@common_options("--backbone", "--detector")
def command(common: Common, size: str | None) -> None:
    """List backbones, detectors and recipes with parameters and MACs.

    Backbones are counted as classifiers of 1000 classes at 224x224; --size adds whole detectors
    (80 classes) on every backbone, or on --backbone alone. One multiply-add is one MAC;
    convolutions and linear layers count. Supernets have a range: stem and blocks of their lightest
    and heaviest network, without a classifier's last layers, as `detkit search` limits them.

    \b
    Examples:
      detkit models
      detkit models --size 800x1344 --backbone detnet59
      detkit models --backbone detnas:small:2120-2112-33130031-3132
      detkit models --json
    """
    from detkit import api

    wanted = common.flags.get("model", {})
    table = api.model_table(height_by_width(size), wanted.get("backbone"), wanted.get("detector"))
    emit(common, table, lambda: _show(table, size))


def _show(table: dict[str, Any], size: str | None) -> None:
    from detkit.cli.tables import amount, print_table, slim_table

    rows = [
        [b["name"], amount(b["params"]), amount(b["macs_224"]), " ".join(map(_stage, b["stages"]))]
        for b in table["backbones"]
    ]
    columns = ["name", "params", "MACs", "channels/stride of its stages"]
    print_table(slim_table("backbones, as classifiers at 224x224", columns, rows))
    rows = [
        [
            s["name"],
            amount(s["params"]),
            f"{s['choices']}^{s['positions']} networks, bodies of "
            + " to ".join(f"{amount(macs)}MACs" for macs in s["body_macs_224"]),
        ]
        for s in table["supernets"]
    ]
    if rows:
        click.echo()
        print_table(slim_table("supernets", ["name", "params", "holds"], rows))
    click.echo()
    if size:
        rows = [
            [d["name"], amount(d["params"]), amount(d["macs"]), d["backbone"]]
            for d in table["detectors"]
        ]
        print_table(
            slim_table(f"detectors at {size}", ["name", "params", "MACs", "backbone"], rows)
        )
    else:
        names = ", ".join(d["name"] for d in table["detectors"])
        print_table(slim_table("detectors", ["name"], [[names]]))
    click.echo()
    rows = [[r["name"], r["summary"]] for r in table["recipes"]]
    print_table(slim_table("recipes", ["name", "summary"], rows))


def _stage(stage: dict[str, Any]) -> str:
    return f"{stage['channels']}/{stage['stride']}"
