"""`detkit bench`: how fast the operators, detectors and training are here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from detkit.cli.options import Common, common_options, emit, height_by_width
from detkit.cli.tables import print_table, slim_table
from detkit.errors import ConfigError

Row = dict[str, Any]


@click.group(invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Measure speed and memory; `ops` where nothing is said.

    \b
    Examples:
      detkit bench ops --only nms,roi_align
      detkit bench model --recipe light-head/setting-s-700 --size 700x1100
      detkit bench train --recipe tiny/light-head
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(ops)


_SAVE = click.option(
    "--save", type=click.Path(path_type=Path), metavar="FILE", help="Write the JSON here too."
)


@command.command()
@click.option("--only", default="", metavar="OP,…", help="Operators, separated by commas.")
@click.option("--quick", is_flag=True, help="A fifth of the time per row, for a first look.")
@click.option("--threads", default="", metavar="N,…", help="CPU threads.  [default: 1 and all]")
@_SAVE
@common_options()
def ops(common: Common, only: str, quick: bool, threads: str, save: Path | None) -> None:
    """Time every operator beside its reference and the peers that are installed.

    Contestants run in turn; a ratio is the median of pairs timed in the same round, and does not
    depend on the machine's load as times do. "of limit" is the fraction of the fastest matrix
    product or convolution (operators that convolve) or of a large copy, measured in the same run.

    \b
    Examples:
      detkit bench ops --only nms,roi_align --quick
      detkit bench ops --json --save benchmarks/results/ops_cpu.json
    """
    from detkit.bench.operators import bench_ops
    from detkit.loading import pick_device

    if common.recipe or common.config_file or common.overrides:
        raise ConfigError(
            "bench ops: must stand without settings, got some; it has sizes of its own"
        )
    if _only_planned(common, {"only": only, "quick": quick, "threads": _counts(threads)}):
        return

    def on_row(row: Row, so_far: Row) -> None:
        click.echo(_row_line(row), err=True)
        _save(save, so_far)  # a run that is stopped leaves the rows it has

    result = bench_ops(
        device=str(pick_device(common.device)),
        threads=_counts(threads),
        only=[name for name in only.split(",") if name],
        seconds=0.2 if quick else 1.0,
        on_row=on_row,
    )
    _save(save, result)
    emit(common, result, lambda: _show_ops(result))


@command.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option("--size", metavar="HxW", help="Pixels.  [default: the sides of the config]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(3), default=9, show_default=True)
@click.option("--threads", default="", metavar="N", help="CPU threads.  [default: torch's choice]")
@click.option("--compile", is_flag=True, help="torch.compile too; it takes minutes on a CPU.")
@click.option("--cuda-graph", is_flag=True, help="CUDA graphs too; on a GPU.")
@_SAVE
@common_options("--detector", "--backbone")
def model(
    common: Common,
    checkpoint: Path | None,
    size: str | None,
    batch: int,
    rounds: int,
    threads: str,
    compile: bool,
    cuda_graph: bool,
    save: Path | None,
) -> None:
    """Time one detector: eager, folded, channels-last, bf16, fixed sizes, and each of its parts.

    CHECKPOINT, or random weights of --recipe, --detector and --backbone. With --compile and
    --cuda-graph those forms stand in the table too, and with both of them both at once.

    \b
    Examples:
      detkit bench model --recipe light-head/setting-s-700 --size 700x1100
      detkit bench model best.pth --batch 4 --device cuda --compile --cuda-graph
    """
    from detkit.bench.detectors import bench_model

    plan: Row = {"checkpoint": checkpoint and str(checkpoint), "size": height_by_width(size)}
    plan |= {"batch": batch, "threads": _one_count(threads)}
    if _only_planned(common, plan | {"compile": compile, "cuda_graph": cuda_graph}):
        return
    result = bench_model(
        checkpoint,
        recipe=common.recipe,
        overrides=common.layers(),
        device=common.device,
        size=height_by_width(size),
        batch=batch,
        rounds=rounds,
        threads=_one_count(threads),
        compile=compile,
        cuda_graph=cuda_graph,
    )
    _save(save, result)
    emit(common, result, lambda: _show_model(result))


@command.command()
@click.option("--threads", default="", metavar="N", help="CPU threads.  [default: torch's choice]")
@_SAVE
@common_options("--detector", "--backbone", "--data", "--batch-size", "--workers", "--steps")
def train(common: Common, threads: str, save: Path | None) -> None:
    """Time training steps: images per second, waiting for data, memory, parts of a step.

    \b
    Examples:
      detkit bench train --recipe tiny/light-head --steps 20
      detkit bench train --recipe detnet/resnet50-fpn --data cells --device cuda
    """
    from detkit.bench.training import bench_train

    if _only_planned(common, {"threads": _one_count(threads)}):
        return
    result = bench_train(
        recipe=common.recipe,
        overrides=common.layers(),
        device=common.device,
        threads=_one_count(threads),
    )
    _save(save, result)
    emit(common, result, lambda: _show_train(result))


def _only_planned(common: Common, plan: Row) -> bool:
    """Whether --dry-run has shown the plan; refuses --out, since there is one file to write."""
    if common.out is not None:
        raise ConfigError(
            f"--out: must be left out here, got {common.out}; --save FILE writes JSON"
        )
    plan = {"dry_run": True, "device": common.device, "recipe": common.recipe} | plan
    if common.dry_run:
        emit(common, plan, lambda: click.echo(plan))
    return common.dry_run


def _counts(text: str) -> list[int]:
    parts = [part for part in text.split(",") if part]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--threads: must be positive numbers with commas between, got {text!r}")
    return [int(part) for part in parts]


def _one_count(text: str) -> int | None:
    counts = _counts(text)
    if len(counts) > 1:
        raise ConfigError(f"--threads: must be one number here, got {text!r}")
    return counts[0] if counts else None


def _save(path: Path | None, result: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _row_line(row: Row) -> str:
    return f"{row['op']} {row['size']} {row['pass']} {row['dtype']} T{row['threads']} {_peers(row)}"


def _peers(row: Row) -> str:
    return ", ".join(
        f"{name} failed" if "failed" in t else f"{name} {t['ratio']:.3g}x"
        for name, t in row["others"].items()
    )


def _show_ops(result: Row) -> None:
    rows: list[Row] = result["rows"]
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op]
        columns = ["size", "pass", "T", "ms", "limit", "MiB", "others' time / detkit's"]
        print_table(slim_table(op, columns, (_cells(row) for row in own)))
    _show_machine(result)
    for threads, reached in result["limits"].items():
        shown = (f"{k} {v:.0f} {'GB/s' if k == 'copy' else 'GFLOP/s'}" for k, v in reached.items())
        click.echo(f"limits with {threads} threads: {', '.join(shown)}")


def _cells(row: Row) -> Sequence[str]:
    short = {"forward": "fwd", "backward": "bwd", "forward+backward": "f+b"}
    kind = short[row["pass"]] + (" bf16" if row["dtype"] == "bf16" else "")
    memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    size = row["size"]
    return (
        size,
        kind,
        str(row["threads"]),
        f"{row['ms']:.3g}",
        f"{row['of_limit']:.2g}",
        memory,
        _peers(row),
    )


def _show_machine(result: Row) -> None:
    facts = result["hardware"]
    names = ("device", "instructions", "cores", "threads", "torch", "load_before", "load_after")
    shown = {n: f"{v:.1f}" if isinstance(v, float) else v for n, v in facts.items()}
    click.echo(", ".join(f"{name} {shown[name]}" for name in names if name in shown))
    if result.get("peers"):
        click.echo("peers: " + ", ".join(f"{k} {v}" for k, v in result["peers"].items()))


def _show_model(result: Row) -> None:
    rows: Iterable[Sequence[Any]] = (
        (r["variant"], f"{r['ms']:.2f}", f"{r['images_per_second']:.2f}", f"{r['ratio']:.2f}")
        for r in result["variants"]
    )
    title = f"{result['model']}, {result['batch']} x {result['size'][0]}x{result['size'][1]}"
    print_table(slim_table(title, ["detect", "ms", "images/s", "of eager"], rows))
    for row in result["variants"]:
        if row["first_s"] is not None:
            click.echo(f"first call of {row['variant']}: {row['first_s']:.1f} s")
    for name, reason in result["failed"].items():
        click.echo(f"{name} is left out: {reason}")
    _show_parts(f"parts of {result['parts_of']}", result["parts"])
    if result["peak_mib"] is not None:
        click.echo(f"memory of one call beyond the model: {result['peak_mib']:.0f} MiB")
    _show_machine(result)


def _show_train(result: Row) -> None:
    click.echo(
        f"{result['model']}: {result['images_per_second']:.2f} images/s over {result['steps']} "
        f"steps of {result['batch']}, {100 * result['data_wait']:.1f} % of the time waiting for "
        f"data"
    )
    _show_parts("parts of a step", result["parts"])
    click.echo(f"peak memory: {result['peak_gib']:.2f} GiB ({result['peak_of']})")
    _show_machine(result)


def _show_parts(title: str, parts: dict[str, float]) -> None:
    total = sum(parts.values())
    rows = [(name, f"{ms:.2f}", f"{100 * ms / total:.0f} %") for name, ms in parts.items()]
    print_table(slim_table(title, ["part", "ms", "share"], rows))
