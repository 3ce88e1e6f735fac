"""One process or many: torchrun's environment, agreement between ranks, and ``--gpus N``.

Collectives on CPU tensors go through gloo also where gradients go through nccl, so that asking the
other ranks a question never waits for the device.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]  # public
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_SHUTDOWN_SECONDS = "120"  # what a process gets to finish its step and save before it is killed
_TIMEOUT = timedelta(hours=24)  # ranks wait for a long evaluation of rank 0; stalls have a watchdog


def rank() -> int:
    """Number of this process, 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and talks to the user."""
    return rank() == 0


def local_world_size() -> int:
    """Number of processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1


def launched() -> bool:
    """Whether this process was started by torchrun or :func:`launch`."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started; yields this process's device.

    Without torchrun's environment it yields ``device`` and does nothing.
    """
    if not launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        _join("cpu:gloo,cuda:nccl")
    else:
        _join("gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _join(backend: str) -> None:
    """Meet the other processes, those of this start only.

    Where torchrun starts a group anew after one of its processes died, the store of the first
    start serves again, with the addresses of processes that are gone.
    """
    store, rank_, world = next(rendezvous("env://", timeout=_TIMEOUT))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = PrefixStore(f"start-{start}", store)
    dist.init_process_group(backend, store=own, rank=rank_, world_size=world, timeout=_TIMEOUT)


def leave(code: int) -> NoReturn:
    """End this process with ``code``; one of a group ends at once.

    The interpreter's own shutdown ends threads where they stand, and one of the group's threads in
    C++ turns that into an abort now and then: another exit code than the one meant.
    """
    if not launched():
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with gradients averaged over all processes; itself where there is only one."""
    if world_size() == 1:
        return model
    ids = [device] if device.type == "cuda" else None
    # A rank whose images hold no boxes, or one path of a supernet, may leave parameters unused;
    # without the search for them the other ranks would wait for gradients that never come.
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)


def gather_numbers(values: Sequence[float]) -> Tensor:
    """(world, len(values)) float64 on the CPU: the values of every rank."""
    own = torch.tensor(values, dtype=torch.float64)
    if world_size() == 1:
        return own[None]
    everyone = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(everyone, own)
    return torch.stack(everyone)


def gather(value: T) -> list[T]:
    """The plain values of every rank, in order of rank."""
    if world_size() == 1:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def broadcast(value: T) -> T:
    """Rank 0's plain value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0 (batch-norm statistics differ between ranks)."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def launch(processes: int, command: Sequence[str], *, threads: int | None = None) -> int:
    """Run ``command`` in ``processes`` processes of this machine, as torchrun does.

    Args:
        processes: How many, one per GPU.
        command: Program and arguments; each process finds its rank in the environment.
        threads: Threads of each; by default ``OMP_NUM_THREADS``, or its share of the cores.

    Returns:
        The exit code: 0, that of the process that failed first, or 128 + the signal.
    """
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SHUTDOWN_SECONDS)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    handlers = {number: signal.getsignal(number) for number in _PASSED_ON}
    disabled = logging.root.manager.disable
    if "LOGLEVEL" not in os.environ:  # torch's variable for those who want to see its launcher work
        logging.disable(logging.ERROR)  # the processes have said what was wrong
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        return _exit_code(error)
    except SignalException as error:  # this process was asked to stop and has passed it on
        return 128 + int(error.sigval)
    finally:
        logging.disable(disabled)
        for number, handler in handlers.items():  # the launcher leaves its own behind
            signal.signal(number, handler or signal.SIG_DFL)
    return 0


def _exit_code(error: ChildFailedError) -> int:
    codes = [failure.exitcode for failure in error.failures.values()]
    codes.sort(key=lambda code: error.get_first_failure()[1].exitcode != code)
    # Where one rank stops for a reason, another may die of the broken connection: with code 1, or
    # by a signal (negative) when the connection's own thread aborts.
    stopped = [code for code in codes if code > 1]
    code = next(iter([*stopped, *(code for code in codes if code < 0)]), 1)
    return 128 - code if code < 0 else code
