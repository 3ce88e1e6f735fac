"""Files that are written: a disk that refuses is one error, and files come whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from detkit.errors import StorageError


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Make the body's OSError a StorageError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: must be writable, got {error.strerror or error}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step, so that no half of it is ever there.

    Raises:
        StorageError: The disk refuses.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            part.write_bytes(content)
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
