"""Who does which piece of work: one process, or many that each take the next one when free.

All processes call the same functions in the same order and get the same answers, whoever did the
work. Pieces may take uneven times: nobody waits before all pieces are taken.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, badly exported
from torch.distributed.distributed_c10d import Store

_POLL_SECONDS = 0.05
_CONNECT = timedelta(minutes=5)
_WORK = timedelta(hours=24)  # one candidate may take long; who loses a process is ended by torchrun


class WorkQueue(Protocol):
    """Work shared between processes. Pieces and results are plain strings or numbers."""

    @property
    def rank(self) -> int:
        """Number of this process."""

    def share(self, name: str, make: Callable[[], str]) -> str:
        """What ``make`` gives on rank 0, on every rank; ``name`` is used once."""

    def run(self, name: str, count: int, do: Callable[[int], str]) -> list[str]:
        """``[do(0), ..., do(count - 1)]``, each done by one process; ``name`` is used once."""


class LocalQueue:
    """One process does everything."""

    rank = 0

    def share(self, name: str, make: Callable[[], str]) -> str:
        """What ``make`` gives."""
        return make()

    def run(self, name: str, count: int, do: Callable[[int], str]) -> list[str]:
        """``[do(0), ..., do(count - 1)]``."""
        return [do(index) for index in range(count)]


class StoreQueue:
    """Processes that take the next piece from a counter in a store of ``torch.distributed``.

    Args:
        store: The same store in every process; see :func:`work_queue`.
        rank: Number of this process.
        world: Number of processes.
        idle: Called again and again while this process waits for others; may raise.
    """

    def __init__(
        self, store: Store, rank: int, world: int, idle: Callable[[], None] | None = None
    ) -> None:
        self._store = store
        self._rank = rank
        self._world = world
        self._idle = idle or (lambda: None)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self._rank

    def share(self, name: str, make: Callable[[], str]) -> str:
        """What ``make`` gives on rank 0, on every rank; ``name`` is used once."""
        if self._rank == 0:
            self._store.set(f"share/{name}", make())
        return self._get(f"share/{name}")

    def run(self, name: str, count: int, do: Callable[[int], str]) -> list[str]:
        """``[do(0), ..., do(count - 1)]``, each done by one process; ``name`` is used once."""
        while (index := self._store.add(f"next/{name}", 1) - 1) < count:
            self._store.set(f"done/{name}/{index}", do(index))
        return [self._get(f"done/{name}/{i}") for i in range(count)]

    def _get(self, key: str) -> str:
        """Wait in short turns: between them Python takes signals, in the store it would not."""
        while not self._store.check([key]):
            self._idle()
            time.sleep(_POLL_SECONDS)
        return str(self._store.get(key), "utf-8")

    def leave(self) -> None:
        """Needs the queue no more; rank 0, which holds the store, waits for the others."""
        if self._rank:
            self._store.set(f"left/{self._rank}", "")
        else:
            self._store.wait([f"left/{rank}" for rank in range(1, self._world)])


def _open_store() -> Store:
    """A store of the processes of torchrun's group, held by rank 0.

    Needs an initialised process group that takes CPU tensors.
    """
    if dist.get_rank() == 0:
        server = _store(0, master=True)  # any free port
        dist.broadcast_object_list([server.port], src=0)
        return server
    port: list[int] = [0]
    dist.broadcast_object_list(port, src=0)
    return _store(port[0], master=False)


def _store(port: int, *, master: bool) -> TCPStore:
    host = os.environ["MASTER_ADDR"]
    store = TCPStore(host, port, None, master, _CONNECT, wait_for_workers=False)
    store.set_timeout(_WORK)
    return store


@contextlib.contextmanager
def work_queue(idle: Callable[[], None] | None = None) -> Iterator[WorkQueue]:
    """A queue over all processes of the group, or of this one where there is no other.

    Rank 0 leaves it last; after an error nobody waits.

    Args:
        idle: Called again and again while this process waits for others; may raise.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield LocalQueue()
        return
    queue = StoreQueue(_open_store(), dist.get_rank(), dist.get_world_size(), idle)
    yield queue
    queue.leave()
