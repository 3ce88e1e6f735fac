"""What `--dry-run` prints: what all would take, and the settings with the origin of each.

All of it is valid TOML, so that what is printed can be kept as a config file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import click
import tomli_w

from detkit.cli.tables import amount

Record = Mapping[str, Any]


def show(found: Record) -> None:
    """Print the rehearsal of a training."""
    for line in _lines(found):
        click.echo(f"# {line}")
    show_settings(found["config"], found["origins"])


def show_search(found: Record) -> None:
    """Print the rehearsal of a search."""
    for line in _search_lines(found):
        click.echo(f"# {line}")
    tables = {name: found["config"][name] for name in ("search", "data", "eval")}
    show_settings(tables, found["origins"])


def show_demo(found: Record) -> None:
    """Print the rehearsal of the demo's trainings, without their settings."""
    for part in found["parts"].values():
        click.echo("\n".join(_lines(part)) + "\n")
    whole = duration(found["eta"]["seconds"])
    click.echo(
        f"demo in {found['out']}: about {whole} of training, an estimate; the second fine-tuning, "
        "of the decomposed net, is taken to last as long as the first"
    )


def show_settings(config: Record, origins: Record) -> None:
    """Print settings as TOML, each followed by where its value comes from."""
    for table, values in config.items():
        click.echo(f"\n[{table}]")
        lines = {key: f"{key} = {_value(value)}" for key, value in values.items()}
        width = min(40, max(map(len, lines.values())))
        for key, text in lines.items():
            click.echo(f"{text:<{width}}  # {origins[table][key]}")


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return tomli_w.dumps({"v": value}).partition(" = ")[2].rstrip("\n")


def _lines(found: Record) -> Iterator[str]:
    where = found["device"] + (f", {n} processes" if (n := found["processes"]) > 1 else "")
    yield f"{found['command']} on {where}: two steps done, nothing written"
    for part, split in found["splits"].items():
        yield f"{part:<12}{_split(split)}"
    height, width = found["macs_image"]
    yield (
        f"{'model':<12}{amount(found['params'])} parameters, {amount(found['macs'])} multiply-adds "
        f"for an image of {height}x{width}"
    )
    yield f"{'memory':<12}{_memory(found['memory'])}"
    yield f"{'rate':<12}{_rate(found['learning_rate'])}"
    for point in found["learning_rate"]["points"]:
        at = f"step {point['step']}" if point["step"] is not None else f"{point['share']:.0%}"
        yield f"{'':<12}{point['lr']:.3g} from {at} on ({point['what']})"
    yield f"{'steps':<12}{_steps(found['steps'])}"
    yield f"{'time':<12}{_time(found['eta'])}"
    yield f"{'disk':<12}{_disk(found['disk'])}"
    if found["continues"]:
        yield f"{'continues':<12}{found['continues']} after step {found['steps']['done_before']}"


def _search_lines(found: Record) -> Iterator[str]:
    eta, measured = found["eta"], found["measured"]
    where = found["device"] + (f", {n} processes" if (n := found["processes"]) > 1 else "")
    yield f"search on {where}: two networks evaluated, nothing written"
    yield f"{'supernet':<12}{found['supernet']}"
    low, high = found["macs"]
    yield (
        f"{'space':<12}{found['space']}: {found['networks']} networks of {amount(low)} to "
        f"{amount(high)} multiply-adds (stem and blocks at 224x224)"
    )
    limits = ", ".join(f"{name} {value:,}" for name, value in found["limits"].items())
    yield f"{'limits':<12}{limits or 'none'}"
    yield (
        f"{'images':<12}{found['search_images']} score a network by {found['metric']}, "
        f"{found['calibration_images']} of {found['training_images']} for its norms, "
        f"{found['classes']} classes"
    )
    memory = found["memory"]
    yield (
        f"{'memory':<12}{_memory(memory)}; images kept take at most {size(memory['cache_at_most'])}"
    )
    yield (
        f"{'networks':<12}{found['evaluations']} to evaluate, {found['done_before']} are done; "
        f"each {duration(eta['calibration_seconds'])} for its norms and "
        f"{duration(eta['scoring_seconds'])} for its score"
    )
    yield (
        f"{'time':<12}about {duration(eta['seconds'])}, an estimate from {measured['images']} "
        "images and two batches"
    )
    if found["continues"]:
        yield f"{'continues':<12}{found['continues']}"


def _split(split: Record) -> str:
    total, classes = split["images"], split["classes"]
    most = sorted(classes, key=lambda name: -classes[name])[:5]
    shown = ", ".join(f"{name} {classes[name]}" for name in most)
    more = ", ..." if len(classes) > len(most) else ""
    boxes = "" if split["boxes"] is None else f", {split['boxes']} boxes"
    return f"{split['name']!r}: {total} images{boxes}, {len(classes)} classes ({shown}{more})"


def _memory(memory: Record) -> str:
    parts = [f"peak of {size(memory['process'])} in this process"]
    if memory["loader"]:
        parts.append(f"{size(memory['loader'])} in a loader process, most of it shared")
    if memory["gpu"]:
        parts.append(f"{size(memory['gpu'])} of the GPU")
    return ", ".join(parts)


def _rate(rate: Record) -> str:
    return (
        f"{rate['for_16_images']:g} for 16 images is {rate['used']:.3g} for {rate['batch_size']} "
        f"per step; schedule {rate['schedule']}"
    )


def _steps(steps: Record) -> str:
    about = "" if steps["exact"] else "about "
    return (
        f"{about}{steps['total']} ({steps['per_epoch']:.4g} are one pass), each "
        f"{steps['seconds']:.3g} s of which {steps['data_wait_seconds']:.2g} s wait for data, "
        f"{steps['images_per_second']:.3g} images/s"
    )


def _time(eta: Record) -> str:
    parts = [f"training {duration(eta['training_seconds'])}"]
    if eta["evaluations"]:
        parts.append(f"{eta['evaluations']} x {duration(eta['evaluation_seconds'])} evaluating")
    if eta["scales_seconds"]:
        parts.append(f"scales {duration(eta['scales_seconds'])}")
    whole = duration(eta["seconds"])
    return f"about {whole}, an estimate from the second step ({', '.join(parts)})"


def _disk(disk: Record) -> str:
    warning = "" if disk["free"] > disk["peak"] else ": NOT ENOUGH"
    parts = ", ".join(
        f"{name} {size(disk[key])}"
        for key, name in (("last", "last.pth"), ("best", "best.pth"), ("logs", "logs"))
    )
    return (
        f"{size(disk['total'])} in {disk['folder']} ({parts}), at most {size(disk['peak'])} while "
        f"saving; {size(disk['free'])} free{warning}"
    )


def duration(seconds: float) -> str:
    """``0:12:30``, or ``3.2 s`` below a minute."""
    return f"{seconds:.2g} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def size(count: float) -> str:
    """``12.3 MiB`` of a number of bytes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
