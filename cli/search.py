"""`detkit search`: find the fittest path of a trained supernet, and write recipes to train it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from detkit.cli.options import Common, common_options, emit
from detkit.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_PLAIN = ("method", "fitness", "population", "generations", "split", "latency_device")

log = logging.getLogger("detkit")


@click.command("search")
@click.argument("supernet", required=False, metavar="[SUPERNET]")
@click.option("--split", help="Images that score networks.  [default: those held out]")
@click.option(
    "--max-macs", metavar="N", help="Most multiply-adds of stem and blocks at 224x224, as 300M."
)
@click.option("--max-latency", type=float, metavar="MS", help="Most milliseconds per image.")
@click.option(
    "--latency-device", type=click.Choice(["cpu", "cuda"]), help="Where blocks are measured."
)
@click.option("--population", type=int, help="Networks per generation.  [default: 50]")
@click.option("--generations", type=int, help="Generations.  [default: 20]")
@click.option(
    "--method",
    type=click.Choice(["evolution", "random"]),
    help="random: as many networks, drawn blindly.  [default: evolution]",
)
@click.option(
    "--fitness",
    type=click.Choice(["detection", "classification"]),
    help="classification: top-1 of the pre-trained supernet.  [default: detection]",
)
@click.option(
    "--resume",
    metavar="auto|RUN",
    help="Continue a search: `auto` takes --out, else the newest one with these settings, if any.",
)
@click.option("--gpus", type=click.IntRange(1), help="Processes to search on, one per GPU.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    help="Networks at once on a CPU, a process each.  [default: one per core, up to 16]",
)
@click.option(
    "--export",
    "target",
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="Search nothing: write recipes to train the best network of the search in SUPERNET.",
)
@common_options("--data", "--images", "--on-bad-image", "--workers")
def command(
    common: Common,
    supernet: str | None,
    target: Path | None,
    resume: str | None,
    gpus: int | None,
    processes: int | None,
    **options: Any,
) -> int:
    """Search the paths of a supernet for the fittest network within limits (DetNAS).

    Without SUPERNET it takes the newest run that trained one; a search that was killed goes on
    with --resume auto.

    \b
    Examples:
      detkit search
      detkit search supernet/best.pth --max-macs 300M --population 50 --generations 20 --out found
      detkit search --out found --resume auto --processes 2
      detkit search --method random --out chance
      detkit search found --export best.toml
    """
    layers = _layers(common, options)
    if target is not None:
        return _export(common, supernet, target, resume, layers)
    if common.recipe:
        raise ConfigError(
            f"--recipe: must not be given to search, whose settings are in the supernet, "
            f"got {common.recipe!r}; --config takes a file"
        )
    from detkit import api, detnas

    if supernet is None:
        supernet = _known(common.out, resume) or _newest(layers)
        log.info("searching %s", supernet)
    if "LOCAL_RANK" not in os.environ:
        count, threads = detnas.processes(common.device, gpus, processes)
        if count > 1:
            line = click.get_current_context().obj
            return api.launch_processes(count, line, threads=threads)
    if common.dry_run:
        _rehearse(common, supernet, layers, resume)
        return 0
    from detkit.cli.progress import SearchBar

    with SearchBar() as bar:
        result = detnas.search(
            supernet,
            overrides=layers,
            out=common.out,
            device=common.device,
            resume=resume,
            on_progress=bar,
        )
    if os.environ.get("RANK", "0") == "0":
        emit(common, result, lambda: _show(result))
    return 0


def _layers(common: Common, options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Settings in the order they apply; the seed is that of the search."""
    table: dict[str, Any] = {k: options[k] for k in _PLAIN if options[k] is not None}
    if options["max_macs"] is not None:
        table["max_macs"] = count("--max-macs", options["max_macs"])
    if options["max_latency"] is not None:
        table["max_latency_ms"] = options["max_latency"]
    if common.seed is not None:
        table["seed"] = common.seed
    return replace(common.with_flags("search", table), seed=None).layers()


def count(option: str, text: str) -> int:
    """Number of a text such as ``300M`` or ``1.3G``; raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)", text.strip().upper())
    if not match:
        raise ConfigError(f"{option}: must be a number with K, M or G or without, got {text!r}")
    return round(float(match[1]) * _UNITS[match[2]])


def _known(out: Path | None, resume: str | None) -> str | None:
    """The supernet of the search to go on with."""
    from detkit.detnas import SearchFolder

    where = out if resume == "auto" else resume
    if where is None or not SearchFolder(where).is_search:
        return None
    return str(SearchFolder(where).read()["supernet"]["file"])


def _newest(layers: list[Mapping[str, Any]]) -> str:
    from detkit import config as configs
    from detkit import detnas

    return detnas.newest_supernet(configs.resolve(layers).search.fitness)


def _export(
    common: Common,
    run: str | None,
    target: Path,
    resume: str | None,
    layers: list[Mapping[str, Any]],
) -> int:
    given = {"--resume": resume, "--out": common.out}
    given |= {f"the setting {table}": values for layer in layers for table, values in layer.items()}
    for name, value in given.items():
        if value:
            raise ConfigError(f"--export: must stand without {name}, got both")
    from detkit import detnas, retrain

    run = run or detnas.newest_search()
    if common.dry_run:
        emit(common, {"dry_run": True, "run": run, "pretrain": str(target)}, lambda: None)
        return 0
    result = retrain.export(run, target, recipe=common.recipe)

    def show() -> None:
        click.echo(f"{result['genes']}: {result['metric']} {result['fitness']:.4f} as a path")
        click.echo(f"next: detkit pretrain --recipe {result['pretrain']}")
        if result["finetune"]:
            click.echo(f"then: detkit finetune --recipe {result['finetune']} --init-from BACKBONE")

    emit(common, result, show)
    return 0


def _rehearse(
    common: Common, supernet: str, layers: list[Mapping[str, Any]], resume: str | None
) -> None:
    from detkit import detnas
    from detkit.cli.rehearsal import show_search

    found = detnas.rehearse_search(
        supernet, layers, out=common.out, device=common.device, resume=resume
    )
    if os.environ.get("RANK", "0") == "0":
        emit(common, found, lambda: show_search(found))


def _show(result: Mapping[str, Any]) -> None:
    from detkit.cli.tables import print_table, rows_table

    extra = [name for name in ("AP50", "AP75") if name in result["best"]["metrics"]]
    timed = "latency_ms" in result["best"]
    columns = ["", "genes", result["metric"], *extra, "M MACs", *(["ms"] if timed else [])]
    rows = [
        [
            str(place),
            net["genes"],
            f"{net['fitness']:.4f}",
            *(net["metrics"][name] for name in extra),
            f"{net['macs'] / 1e6:.1f}",
            *([f"{net['latency_ms']:.2f}"] if timed else []),
            net["generation"],
            net["index"],
        ]
        for place, net in enumerate(result["top"], 1)
    ]
    print_table(rows_table("fittest networks", [*columns, "generation", "number"], rows))
    click.echo(
        f"{result['evaluations']} networks evaluated, {result['failed']} failed, "
        f"{result['dropped']} dropped early"
    )
    click.echo(f"run        {result['run']}")
    click.echo(f"best       {result['best']['backbone']}")
    click.echo(f"next: detkit search {result['run']} --export best.toml")
