"""The little of YAML that data set descriptions use: keys with a scalar, a list or a map of
scalars.

Other keys are passed over unread. What stands at a wanted key in any other form is refused with
its line, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from detkit.errors import DataError

Value = str | list[str] | dict[str, str]

_KEY = re.compile(
    r"""(?P<key>"[^"]*"|'[^']*'|[^\s#:'"\[\]{},&*!|>%@`-][^:#]*?)\s*:(?:\s+|$)(?P<rest>.*)"""
)
_UNREADABLE = tuple("&*!|>%@`")


def read_yaml(path: Path, wanted: Iterable[str]) -> dict[str, Value]:
    """The wanted top-level keys of a file; scalars come as text, an empty value as "".

    Raises:
        DataError: the file cannot be read, or a wanted key has a form not understood here.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: must be readable text, got {error}") from error
    keys = set(wanted)
    return {k: _value(block, path) for k, block in _blocks(text, path) if k in keys}


# A block is a top-level key with its lines, each with its number in the file.
_Lines = list[tuple[int, str]]


def _blocks(text: str, path: Path) -> list[tuple[str, _Lines]]:
    blocks: list[tuple[str, _Lines]] = []
    for number, line in enumerate(text.splitlines(), 1):
        bare = _without_comment(line)
        if not bare.strip() or line.startswith(("---", "...", "%")):
            continue
        nested = line[0].isspace() or line.startswith("- ") or line.rstrip() == "-"
        if blocks and (nested or _is_open(blocks[-1][1])):
            blocks[-1][1].append((number, bare))
            continue
        match = _KEY.fullmatch(bare.strip())
        if nested or not match:
            raise _refusal(path, number, line)
        blocks.append((_scalar(match["key"], path, number), [(number, match["rest"])]))
    return blocks


def _is_open(block: _Lines) -> bool:
    """Whether a block starts with a bracket and does not close it yet."""
    flow = block[0][1].startswith(("[", "{"))
    return flow and _depth(" ".join(line for _, line in block)) > 0


def _value(block: _Lines, path: Path) -> Value:
    (number, first), *rest = block
    first = first.strip()
    if first.startswith(("[", "{")):
        return _flow(" ".join([first, *(line.strip() for _, line in rest)]), path, number)
    if first:
        if rest:
            raise _refusal(path, rest[0][0], rest[0][1])
        return _scalar(first, path, number)
    items = [(n, line.strip()) for n, line in rest]
    if not items:
        return ""
    if len({len(line) - len(line.lstrip()) for _, line in rest}) > 1:
        raise _refusal(path, *rest[-1])
    if all(line.startswith("- ") for _, line in items):
        return [_scalar(line[2:], path, n) for n, line in items]
    return dict(_pair(line, path, n) for n, line in items)


def _flow(text: str, path: Path, number: int) -> Value:
    """``[a, b]`` or ``{0: a, 1: b}``."""
    closing = {"[": "]", "{": "}"}[text[0]]
    inner = text[1:-1]
    if not text.endswith(closing) or _depth(inner) or re.search(r"[\[\]{}]", _unquoted(inner)):
        raise _refusal(path, number, text)
    items = [item.strip() for item in _split(inner)]
    if items and not items[-1]:
        items.pop()
    if closing == "]":
        return [_scalar(item, path, number) for item in items]
    return dict(_pair(item, path, number) for item in items)


def _pair(text: str, path: Path, number: int) -> tuple[str, str]:
    match = _KEY.fullmatch(text)
    if not match or not match["rest"]:
        raise _refusal(path, number, text)
    return _scalar(match["key"], path, number), _scalar(match["rest"], path, number)


def _scalar(text: str, path: Path, number: int) -> str:
    text = text.strip()
    for quote in "\"'":
        if text.startswith(quote):
            inner = text[1:-1]
            plain = inner.replace("''", "") if quote == "'" else inner
            if (
                len(text) < 2
                or not text.endswith(quote)
                or quote in plain
                or "\\" in inner
                and quote == '"'
            ):
                raise _refusal(path, number, text)
            return inner.replace("''", "'") if quote == "'" else inner
    if text.startswith((*_UNREADABLE, "[", "{", "- ")) or re.search(r":(\s|$)", text):
        raise _refusal(path, number, text)
    return "" if text in ("~", "null", "Null", "NULL") else text


def _without_comment(line: str) -> str:
    """``line`` up to a # that starts a comment: at the beginning or after a space, not in
    quotes.
    """
    quote = ""
    for k, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and (k == 0 or line[k - 1] in " \t[{,:"):
            quote = character
        elif character == "#" and (k == 0 or line[k - 1].isspace()):
            return line[:k].rstrip()
    return line.rstrip()


def _unquoted(text: str) -> str:
    return re.sub(r"\"[^\"]*\"|'[^']*'", "", text)


def _depth(text: str) -> int:
    """Brackets opened and not closed, outside quotes."""
    plain = _unquoted(text)
    return sum(plain.count(c) for c in "[{") - sum(plain.count(c) for c in "]}")


def _split(text: str) -> list[str]:
    """Parts between commas outside quotes."""
    return [m.group() for m in re.finditer(r"(?:\"[^\"]*\"|'[^']*'|[^,\"'])+", text)]


def _refusal(path: Path, number: int, line: str) -> DataError:
    return DataError(
        f"{path}, line {number}: must be plain YAML (keys with scalars, lists or maps of scalars), "
        f"got {line.strip()[:80]!r}"
    )
