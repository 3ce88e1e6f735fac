"""Stopping: SIGTERM and SIGINT let the step finish, a watchdog ends a run that hangs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from detkit.errors import StalledError

_log = logging.getLogger("detkit")
_GRACE_SECONDS = 10.0


class InterruptedBySignalError(Exception):
    """A signal arrived inside :meth:`StopSignals.interrupts`."""


class StopSignals:
    """Context in which SIGTERM and SIGINT only leave a note in :attr:`received`.

    A SIGINT after another signal aborts at once with KeyboardInterrupt. Forked loader workers
    inherit the handlers and ignore both signals, so a Ctrl-C in the terminal does not take them
    away while the step is being finished. Outside the main thread Python allows no handlers and
    nothing is caught.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}
        self._interrupting = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not installed from Python

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = number
        if self._interrupting:
            raise InterruptedBySignalError

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Let a signal break off the body with InterruptedBySignalError."""
        if self.received is not None:
            raise InterruptedBySignalError
        self._interrupting = True
        try:
            yield
        finally:
            self._interrupting = False


class Watchdog:
    """Context that ends the run with exit code 7 when :meth:`beat` is not called for ``seconds``.

    The main thread gets a StalledError. If it does not come back from a call within a few seconds
    (a hung device or collective), the process ends with code 7 as it is. Nothing is saved either
    way. Outside the main thread, which alone takes signals, only the second is possible.
    """

    def __init__(self, seconds: float, grace_seconds: float = _GRACE_SECONDS) -> None:
        self._seconds = seconds
        self._grace = grace_seconds
        self._last = time.monotonic()
        self._pauses = 0
        self._expired = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="detkit-watchdog", daemon=True)
        self._target: int | None = None
        self._previous: Any = None
        self._step = 0

    def __enter__(self) -> Watchdog:
        if threading.current_thread() is threading.main_thread():
            self._target = threading.get_ident()
            self._previous = signal.signal(signal.SIGALRM, self._raise)
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._done.set()
        self._thread.join()
        if self._target is not None:
            signal.signal(signal.SIGALRM, self._previous or signal.SIG_DFL)

    def beat(self, step: int) -> None:
        """Note that ``step`` has finished."""
        self._step = step
        self._last = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the body, which is no step (evaluation, saving)."""
        self._pauses += 1
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._pauses -= 1

    def _message(self) -> str:
        return (
            f"training: a step must finish within train.stall_seconds={self._seconds:g}, got none "
            f"since step {self._step}; look at the data loader and the disk, or raise the limit"
        )

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._seconds / 4)):
            if not self._pauses and time.monotonic() - self._last > self._seconds:
                self._end()
                return

    def _end(self) -> None:
        if self._target is not None:
            self._expired = True
            # A real signal, not a flag: it wakes the main thread from a blocking read or lock.
            signal.pthread_kill(self._target, signal.SIGALRM)
            if self._done.wait(self._grace):
                return
        _log.critical(self._message())
        for handler in _log.handlers:
            handler.flush()
        sys.stderr.flush()
        os._exit(StalledError.exit_code)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._expired:
            self._expired = False
            raise StalledError(self._message())
        if callable(self._previous):
            self._previous(number, frame)
