"""The `detkit` command: a group that imports a command's file only when that command runs."""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import click

from detkit import __version__
from detkit.config import suggest
from detkit.errors import DetkitError, StorageError

COMMANDS = {
    "pretrain": "Train a backbone as a classifier.",
    "finetune": "Train a detector.",
    "decompose": "Turn learnt scales into plain convolutions (POD).",
    "search": "Find the fittest network of a trained supernet (DetNAS).",
    "eval": "Score a detector, or a file of detections, by COCO or VOC metrics.",
    "report": "Write one HTML page about runs: curves, accuracy, errors, pictures.",
    "predict": "Find objects in images: drawn pictures, and a COCO results file.",
    "export": "Write a detector as an ONNX file.",
    "models": "List backbones, detectors and recipes with parameters and MACs.",
    "data": "Check and make data sets.",
    "bench": "Measure speed and memory: operators, a detector, training.",
    "doctor": "Show what is installed and which operator runs where, and why.",
    "demo": "Pre-train, fine-tune, decompose, evaluate, report on synthetic data, in minutes.",
}
_FILES = {"eval": "evaluate"}
_MEMORY_HINT = "try a smaller --batch-size or data.short_side, or more train.accumulate"


class LazyGroup(click.Group):
    """A group whose commands live in files of their own; the help text needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the help text."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, its file imported now."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"detkit.cli.{_FILES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Click's resolution, with the nearest name for an unknown one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = suggest(args[0], COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
            raise click.UsageError(f"unknown command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a pipe whose reader has gone ends it, and is no error."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # here, since click's own answer is exit code 1
            # What is left in the buffer would fail again on leaving.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line per command, from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="detkit")
def cli() -> None:
    """Design, train, slim, search and deploy convolutional object detectors.

    \b
    Examples:
      detkit demo                                  all of it, small, in minutes
      detkit finetune --data my_set --minutes 30   train on your own data
      detkit eval --data my_set                    score the newest run
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 ok, 1 our bug, 2 usage or data, 3 checkpoint, and so on."""
    code = run(list(sys.argv[1:] if argv is None else argv))
    if "RANK" in os.environ:  # one process of several; torch is loaded by now
        from detkit.engine.distributed import leave

        leave(code)
    gc.freeze()  # else Python looks through all that torch made for garbage: a quarter of a second
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line; every failure becomes one sentence and an exit code."""
    try:
        line = list(arguments)  # for commands that start themselves in several processes
        result = cli.main(arguments, prog_name="detkit", standalone_mode=False, obj=line)
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130, arguments)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        path = context.command_path if context else "detkit"
        return _fail(f"{_worded(error)}; see `{path} --help`", 2, arguments)
    except DetkitError as error:
        return _fail(str(error), error.exit_code, arguments)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space and run again" if full else ""
        return _fail(f"input/output: {error}{advice}", StorageError.exit_code, arguments)
    except Exception as error:  # noqa: BLE001 - the last line of defence: our bug, told as one
        return _unexpected(error, arguments)
    return result if isinstance(result, int) else 0


def _worded(error: click.ClickException) -> str:
    """Click's message, with the nearest choice for a value that is none."""
    text = error.format_message().rstrip(".")
    kind = getattr(getattr(error, "param", None), "type", None)
    wrong = re.search(r"'([^']*)' is not one of", text)
    if isinstance(kind, click.Choice) and wrong:
        text += suggest(wrong[1], map(str, kind.choices))
    return text


def _unexpected(error: Exception, arguments: list[str]) -> int:
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"OutOfMemoryError", "MemoryError"} or "can't allocate memory" in str(error):
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return _fail(f"out of memory: {first_line}; {_MEMORY_HINT}", 2, arguments)
    what = f"internal error: {type(error).__name__}: {error}"
    return _fail(f"{what}; run again with --debug and report the traceback", 1, arguments)


def _fail(message: str, code: int, arguments: list[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exc()
    in_json = "--log-format=json" in arguments or ("--log-format", "json") in pairwise(arguments)
    if "--json" in arguments and os.environ.get("RANK", "0") == "0":  # one object, of one process
        click.echo(json.dumps({"error": message, "exit_code": code}))
    elif in_json:
        event = {"time": round(time.time(), 3), "kind": "error", "message": message}
        click.echo(json.dumps(event | {"exit_code": code}), err=True)
    else:
        click.echo(f"Error: {message}", err=True)
    return code
