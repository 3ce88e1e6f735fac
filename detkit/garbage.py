"""Python's cyclic garbage collector, held back where it costs much and finds nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without the collector, which walks all objects again and again as new ones are made.

    It takes a third of the time in which half a million detections are read, a tenth of that in
    which torch is imported, and finds nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
