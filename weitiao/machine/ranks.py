"""The processes of one run: how many torchrun started, which of them this is, and what they tell each other.

    with joined(timeout_seconds=1800) as ranks:         # alone where torchrun has not started this process
        path = ranks.told(lambda: newest(folder))       # found by the first process, known to all
        ranks.size, ranks.first

The first process is the one that plans, speaks and writes. Everything is known from the variables that torchrun sets
(pytorch.org/docs/stable/elastic/run.html); nothing is guessed from a cluster's own.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from weitiao.errors import InputError, RunError, WeitiaoError, t

T = TypeVar("T")
NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STARTED = "torchrun --nproc-per-node {processes} -m weitiao train …"
SPEAKING_SECONDS = 2.0
SHOWN = 20


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``size`` processes, counted from 0, and among those of its machine; ``restarts``: how
    often torchrun has started all of them anew; ``started``: whether it has at all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0
    started: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the process that plans, speaks and writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self.size == 1

    def told(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the first process, which alone does it, in all of them; an error is everybody's."""
        if self.alone:
            return work()
        import torch.distributed as dist

        said: list[Any] = [None, None]
        if self.first:
            try:
                said[0] = work()
            except WeitiaoError as error:
                said[1] = error
            except BaseException as error:
                dist.broadcast_object_list([None, RunError(f"{type(error).__name__}: {error}")])
                raise
        dist.broadcast_object_list(said)
        if said[1] is not None:
            raise said[1]
        return said[0]

    def in_turn(self, work: Callable[[], T], folder: Path) -> T:
        """What ``work`` gives here, after the first process has done it: what it fetches and measures is there by then,
        and the files that it has left in ``folder`` are copied into the ``folder`` of the others."""
        if self.alone:
            return work()
        done: list[T] = []

        def begin() -> dict[str, bytes]:
            done.append(work())
            return {file.name: file.read_bytes() for file in folder.glob("*") if file.is_file()}

        files = self.told(begin)
        if self.first:
            return done[0]
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return work()

    def gathered(self, value: T) -> list[T]:
        """The ``value`` of every process, in order, in all of them."""
        if self.alone:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return any(self.gathered(here))


def launched(environment: Mapping[str, str] | None = None) -> Ranks:
    """This process as torchrun has started it; alone if it has not. InputError where its variables contradict."""
    found = os.environ if environment is None else environment
    if not any(name in found for name in ("WORLD_SIZE", "LOCAL_RANK")):
        return Ranks()
    if missing := [name for name in NEEDED if name not in found]:
        message = "WORLD_SIZE={size} stands for several processes: {names} missing; start them by: {command}"
        size = found.get("WORLD_SIZE", "?")
        command = STARTED.format(processes=size)
        raise InputError(t(message, size=size, names=", ".join(missing), command=command))
    rank, local_rank, size, restarts = (
        _number(found, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    )
    meant = _number(found, "ROLE_WORLD_SIZE") or size
    if size != meant or not rank < size:
        message = "WORLD_SIZE={size} and RANK={rank}, but torchrun has started {started} processes"
        raise InputError(t(message, size=size, rank=rank, started=meant))
    return Ranks(rank, size, local_rank, restarts, started=True)


def _number(found: Mapping[str, str], name: str) -> int:
    value = found.get(name, "0")
    if not value.isdigit():
        raise InputError(t("{name}={value}: not a number of processes", name=name, value=value))
    return int(value)


class Elsewhere(WeitiaoError):
    """The run ends for a reason that another process says."""

    def __init__(self, exit_code: int):
        super().__init__(t("another process says why the run ends"))
        self.exit_code = exit_code


@contextmanager
def joined(timeout_seconds: float) -> Iterator[Ranks]:
    """This process among the others, connected: by NCCL where there are GPUs, each with its own, else by gloo. All but
    the first are silent meanwhile.

    InputError for more processes than GPUs; RunError if another process is gone, or silent for ``timeout_seconds``. Of
    processes that end for one reason, or because another has ended, one raises the reason, and the others Elsewhere.
    """
    ranks = launched()
    if ranks.alone:
        yield ranks
        return
    import torch
    import torch.distributed as dist

    on_gpu, store = torch.cuda.is_available(), None
    if on_gpu and _number(os.environ, "LOCAL_WORLD_SIZE") > torch.cuda.device_count():
        message = "torchrun has started more processes here than there are GPUs ({count}); one process drives one GPU"
        raise InputError(t(message, count=torch.cuda.device_count()))
    if on_gpu:
        torch.cuda.set_device(ranks.local_rank)
    try:
        store, timeout = _meet(ranks, timeout_seconds), timedelta(seconds=timeout_seconds)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=timeout)
        with _quiet(not ranks.first):
            yield ranks
        dist.destroy_process_group()
    except BaseException as error:
        if not _speaks(store):
            raise Elsewhere(getattr(error, "exit_code", 1)) from error
        if isinstance(error, WeitiaoError) or not _lost(error):
            vars(error)["spoken"] = True
            raise
        message = "another of the {size} processes has ended, or has not answered for {seconds} s: {reason}"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(t(message, size=ranks.size, seconds=f"{timeout_seconds:g}", reason=reason)) from error


def _meet(ranks: Ranks, seconds: float) -> Any:
    """The store that these processes share, under a name of their own: torchrun's outlives the processes that it starts
    anew, and still holds the addresses of those that are gone.

    Each says hello with a name that nobody has had; the first answers with its own; who has heard it says so.
    RunError if that takes longer than ``seconds``.
    """
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    address, port, own = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), secrets.token_hex(8)
    hosts = ranks.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(address, port, is_master=hosts, timeout=timedelta(seconds=seconds), wait_for_workers=False)
    if not ranks.first:
        store.set(f"hello/{ranks.rank}", own)
        name = store.get(f"welcome/{own}").decode()
        store.set(f"{name}/{ranks.rank}", own)
        return PrefixStore(name, store)
    absent, end = set(range(1, ranks.size)), time.monotonic() + seconds
    while absent:
        for rank in [rank for rank in absent if store.check([f"hello/{rank}"])]:
            store.set(f"welcome/{store.get(f'hello/{rank}').decode()}", own)
            absent -= {rank} if store.check([f"{own}/{rank}"]) else set()
        if absent and time.monotonic() > end:
            message = "of the {size} processes {ranks} have not come within {seconds} s"
            shown = ", ".join(map(str, sorted(absent)[:SHOWN]))
            raise RunError(t(message, size=ranks.size, ranks=shown, seconds=f"{seconds:g}"))
        time.sleep(0.02)
    return PrefixStore(own, store)


def _speaks(store: Any) -> bool:
    """Whether this process is the first that has something to say; where that cannot be known, it is. The others leave
    it the time to say it: torchrun stops all of them when one has ended."""
    with suppress(Exception):
        if store.add("spoken", 1) > 1:
            time.sleep(SPEAKING_SECONDS)
            return False
    return True


def unheard(error: WeitiaoError) -> bool:
    """Whether ``error`` is another process's to say: before processes have met, that of the first of each machine."""
    early = isinstance(error, InputError) and "spoken" not in vars(error)
    return isinstance(error, Elsewhere) or (early and os.environ.get("LOCAL_RANK", "0") != "0")


def _lost(error: BaseException) -> bool:
    """Whether an error says that another process does not answer, which torch tells by its words alone."""
    import torch.distributed as dist

    words = ("gloo", "nccl", "connection", "timed out", "timeout")
    told = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return told or isinstance(error, dist.DistError)


@contextmanager
def _quiet(silent: bool) -> Iterator[None]:
    """While it is open, a ``silent`` process prints nothing."""
    if not silent:
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def launch_name() -> str:
    """What tells this start of torchrun from any other: its own id, where a person has given one, and else the process
    that started this one."""
    import psutil

    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":
        return name
    with suppress(psutil.Error):
        above = psutil.Process(os.getppid())
        return f"{socket.gethostname()}:{above.pid}:{above.create_time()}"
    return ""
