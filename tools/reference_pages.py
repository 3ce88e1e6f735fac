"""Writes what docs/cli.md, settings.md and recipes.md take from the program.

Run it as `python tools/reference_pages.py`. Commands come from click, settings from the dataclasses
of detkit/config/, recipes from their first lines. Each page keeps its own words; what stands
between its markers `<!-- name -->` and `<!-- end -->` is replaced.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from detkit import config as configs
from detkit.cli.main import cli
from detkit.cli.options import common_options

DOCS = Path(__file__).resolve().parent.parent / "docs"
FAMILIES = {
    "demo": "The demo",
    "tiny": "Minutes on a CPU",
    "detnet": "DetNet",
    "light-head": "Light-Head R-CNN",
    "pod": "POD",
    "detnas": "DetNAS",
    "torchvision": "torchvision's detectors",
}


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table."""
    head = list(columns)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells]]


# --- commands -------------------------------------------------------------------------------------


def shared_options() -> list[click.Parameter]:
    """Options that every command has."""

    @click.command()
    @common_options()
    def empty(common: object) -> None:
        """Nothing."""

    return list(empty.params)


def option_row(option: click.Parameter) -> list[str]:
    """Names, what it takes, what it does."""
    assert isinstance(option, click.Option)  # noqa: S101 (for mypy)
    names = ", ".join(f"`{name}`" for name in option.opts)
    taken = "" if option.is_flag else option.make_metavar(click.Context(click.Command("")))
    default = f" Default: {option.default}." if option.show_default else ""
    return [names, f"`{taken}`" if taken else "", f"{option.help}{default}"]


def example_line(line: str) -> str:
    """An example of the help text; what follows after spaces is a comment in a shell."""
    return re.sub(r"\s{2,}(.*)", r"  # \1", line.strip())


def command_lines(command: click.Command, name: str, shared: set[str]) -> Iterator[str]:
    """One command: how it is called, what it does, examples, its own options."""
    context = click.Context(command, info_name=name)
    yield from ["", f"## {name}", ""]
    text, *examples = re.split(r"\x08\n *Examples?:\n", command.help or "")
    yield from [" ".join(paragraph.split()) + "\n" for paragraph in text.strip().split("\n\n")]
    if isinstance(command, click.Group):
        subs = [f"[{name} {sub}](#{name.replace(' ', '-')}-{sub})" for sub in command.commands]
        yield "Its parts: " + ", ".join(subs) + "."
        return
    yield from ["```text", f"{name} {' '.join(command.collect_usage_pieces(context))}", "```", ""]
    yield from [
        "```sh",
        *map(example_line, inspect.cleandoc(examples[0]).strip().splitlines()),
        "```",
        "",
    ]
    own = [p for p in command.params if isinstance(p, click.Option) and p.name not in shared]
    if own:
        yield from table(["option", "takes", ""], map(option_row, own))


def commands() -> list[str]:
    """Every command, after the options they share."""
    shared = shared_options()
    names = {str(option.name) for option in shared}
    lines = [
        "## Options of every command",
        "",
        *table(["option", "takes", ""], map(option_row, shared)),
    ]
    root = click.Context(cli, info_name="detkit")
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None  # noqa: S101 (for mypy)
        lines += command_lines(command, f"detkit {name}", names)
        if isinstance(command, click.Group):
            for sub, part in command.commands.items():
                lines += command_lines(part, f"detkit {name} {sub}", names)
    return lines


# --- settings -------------------------------------------------------------------------------------


def field_docs(section: type) -> dict[str, str]:
    """Field to the docstring below it."""
    (body,) = ast.parse(inspect.cleandoc(inspect.getsource(section))).body
    assert isinstance(body, ast.ClassDef)  # noqa: S101 (for mypy)
    found = {}
    for field, doc in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            assert isinstance(field.target, ast.Name)  # noqa: S101 (for mypy)
            found[field.target.id] = " ".join(ast.literal_eval(doc.value).split())
    return found


def settings() -> list[str]:
    """A table for each section of a settings file."""
    plain, lines = configs.to_plain(configs.Config()), []
    for section in dataclasses.fields(configs.Config):
        kind = type(getattr(configs.Config(), section.name))
        summary = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0]
        docs, values = field_docs(kind), plain[section.name]
        rows = [[f"`{key}`", f"`{toml(values.get(key))}`", docs[key]] for key in docs]
        lines += ["", f"## [{section.name}]", "", " ".join(summary.split()), ""]
        lines += table(["key", "default", ""], rows)
    return lines[1:]


def toml(value: object) -> str:
    """A value as a settings file writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return "none" if value is None else str(value)


# --- recipes --------------------------------------------------------------------------------------


def recipe_row(name: str, path: Path) -> list[str]:
    """Name, what it is, published score, cost."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = [line[1:].strip() for line in lines[: lines.index("")]]
    first = " ".join(header[: header.index("")] if "" in header else header)
    text = "\n".join(header)
    what, _, score = first.partition(" Published: ")
    score = score or next(iter(re.findall(r"^Published score: (.*?)\.(?:\s|$)", text, re.M)), "")
    cost = next(iter(re.findall(r"^Cost: (.*)", text, re.M)), "").rstrip(".")
    hours = re.findall(r"([\d.]+) GPU hours at 10 TFLOP/s", text)
    if hours:
        cost += f"; {hours[0]} GPU hours at 10 TFLOP/s"
    return [f"`{name}`", what.rstrip("."), score.rstrip("."), cost]


def recipes() -> list[str]:
    """A table for each family."""
    found, lines = configs.recipes(), []
    families = list(dict.fromkeys([*FAMILIES, *(name.split("/")[0] for name in found)]))
    for family in families:
        rows = [recipe_row(name, p) for name, p in found.items() if name.split("/")[0] == family]
        columns = ["recipe", "what", "published", "length and estimate"]
        lines += ["", f"## {FAMILIES[family]}", "", *without_empty(columns, rows)]
    return lines[1:]


def without_empty(columns: list[str], rows: list[list[str]]) -> list[str]:
    """The table without columns that are empty in every row."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


# --- pages ----------------------------------------------------------------------------------------

PAGES = {"cli": commands, "settings": settings, "recipes": recipes}


def page(name: str) -> str:
    """The page as it should read."""
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    made = "\n".join(["", *PAGES[name](), ""])
    new, count = re.subn(
        rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda m: m[1] + made + m[2], text, flags=re.S
    )
    if count != 1:
        raise SystemExit(f"docs/{name}.md: must have <!-- {name} --> and <!-- end --> once")
    return re.sub(r"\n{3,}", "\n\n", new)


def main() -> None:
    """Write each page anew."""
    for name in PAGES:
        (DOCS / f"{name}.md").write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main()
