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
    r"""List backbones, detectors and recipes with parameters and MACs.

    Backbones are counted as classifiers of 1000 classes at 224x224; --size adds whole detectors
    (80 classes) on every
    backbone, or on --backbone alone. One multiply-add is one MAC; convolutions and linear layers
    count. Supernets have a range: stem and blocks of their lightest and heaviest network, without a
    classifier's last layers, as `detkit search` limits them.

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
    from detkit.cli.tables import print_table, rows_table

    rows = [
        [b["name"], b["params"], b["macs_224"], ", ".join(map(_stage, b["stages"]))]
        for b in table["backbones"]
    ]
    columns = ["name", "params", "MACs at 224", "stages (channels/stride)"]
    print_table(rows_table("backbones", columns, rows))
    rows = [
        [s["name"], f"{s['choices']}^{s['positions']}", s["params"], *s["body_macs_224"]]
        for s in table["supernets"]
    ]
    columns = ["name", "networks", "params", "least body MACs", "most"]
    print_table(rows_table("supernets", columns, rows))
    if size:
        rows = [[d["name"], d["backbone"], d["params"], d["macs"]] for d in table["detectors"]]
        print_table(
            rows_table("detectors", ["name", "backbone", "params", f"MACs at {size}"], rows)
        )
    else:
        print_table(rows_table("detectors", ["name"], [[d["name"]] for d in table["detectors"]]))
    rows = [[r["name"], r["summary"]] for r in table["recipes"]]
    print_table(rows_table("recipes", ["name", "summary"], rows))


def _stage(stage: dict[str, Any]) -> str:
    return f"{stage['name']} {stage['channels']}/{stage['stride']}"
