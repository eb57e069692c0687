"""Starting the ranks of one machine, and ending them together.

The ranks meet through a file and talk over the loopback interface, so nothing outside the machine can reach them. A
rank that dies takes the others with it at once, and so does the death of the process that started them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NoReturn

from alexnet_fast.errors import InputError, RunError, out_of_memory
from alexnet_fast.parallel.ranks import joined

# The signal that the launcher sends its ranks for one that it gets. Ranks ignore SIGINT itself, because Ctrl-C sends it
# to every process of the terminal.
PASSED_ON = {signal.SIGINT: signal.SIGUSR1, signal.SIGTERM: signal.SIGTERM}
GRACE = 0.5  # seconds in which ranks that fail together may say why


def ranks_given() -> bool:
    """Whether a launcher such as torchrun started this process as one rank of many."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks_of_launcher() -> tuple[int, int, int, int]:
    """(rank, world, local rank, local world) as the environment has them; raises :class:`InputError` where what
    torchrun sets is missing or no such number.
    """

    def number(name: str, otherwise: int, least: int, most: int) -> int:
        text = os.environ.get(name, str(otherwise))
        if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
            raise InputError(f"{name}: expected a whole number from {least} to {most}, got {text!r} in the environment")
        return int(text)

    world = number("WORLD_SIZE", 1, 1, 10**9 - 1)
    rank = number("RANK", 0, 0, world - 1)
    local_world = number("LOCAL_WORLD_SIZE", world, 1, world)
    local_rank = number("LOCAL_RANK", min(rank, local_world - 1), 0, local_world - 1)
    for name in ("MASTER_ADDR", "MASTER_PORT") if world > 1 else ():
        if not os.environ.get(name):
            raise InputError(f"{name}: missing in the environment, which has RANK and WORLD_SIZE (torchrun sets all)")
    if world > 1:
        number("MASTER_PORT", 0, 1, 65535)
    return rank, world, local_rank, local_world


def launch(worker: Callable[..., int], args: tuple, nproc: int) -> int:
    """Runs ``worker(ranks, *args)`` on every rank and returns the run's exit code.

    Under torchrun this process is one of the ranks; otherwise ``nproc`` processes are started here (one: this process
    itself). Raises what a rank raised as :class:`InputError` or :class:`RunError`. SIGINT and SIGTERM are passed on to
    the ranks once; a second one kills them.
    """
    if ranks_given():
        with joined(*ranks_of_launcher(), "env://") as ranks:
            return worker(ranks, *args)
    if nproc == 1:
        with joined(0, 1, 0, 1, "") as ranks:
            return worker(ranks, *args)
    # Gradients are allocated anew at each step (fc6's is 151 MB); huge pages cut the page faults of that by ten.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    context = multiprocessing.get_context("spawn")
    lifeline, held = context.Pipe(duplex=False)
    processes, reports = [], []
    with tempfile.TemporaryDirectory(prefix="alexnet-fast-") as meeting, _passed_on(processes) as received:
        try:
            for rank in range(nproc):
                if received:
                    break
                report, told = context.Pipe(duplex=False)
                address = f"file://{meeting}/ranks"
                process = context.Process(target=_rank, args=(worker, args, rank, nproc, address, lifeline, told))
                _start(process)
                told.close()
                processes.append(process)
                reports.append(report)
            lifeline.close()
            if received:
                for process in processes:
                    process.kill()
            codes = _watch(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
            held.close()
    return _verdict(codes, reports, received)


def _start(process: BaseProcess) -> None:
    """Starts a rank that ignores SIGINT from its first instruction on. Ctrl-C reaches every process of a terminal, and
    a rank that is still importing its modules would answer it with a traceback.
    """
    resource_tracker.ensure_running()  # before the block: starting it unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _rank(worker, args, rank: int, nproc: int, address: str, lifeline: Connection, told: Connection) -> None:
    threading.Thread(target=_end_with_launcher, args=(lifeline,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher passes it on, as PASSED_ON says
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    try:
        with joined(rank, nproc, rank, nproc, address) as ranks:
            code = worker(ranks, *args)
    except Exception as raised:
        error = out_of_memory(raised) or raised
        code = 2 if isinstance(error, InputError) else 1
        said = isinstance(error, (InputError, RunError))
        told.send((-code, time.monotonic(), str(error) if said else "", "" if said else traceback.format_exc()))
    leave(code)


def leave(code: int) -> NoReturn:
    """Ends a rank's process.

    Python's finalization is left out: DistributedDataParallel keeps the process group and its threads even when the
    group was destroyed, and one that then asks for the interpreter is ended in the middle of C++. Ranks that had done
    their work were seen to die of that: "terminate called without an active exception".
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_launcher(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


@contextlib.contextmanager
def _passed_on(processes: list):
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        for process in processes:
            if process.exitcode is None:
                os.kill(process.pid, PASSED_ON[number] if len(received) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: list) -> list[int | None]:
    """Exit codes once all ranks have ended well, or shortly after one has not (None: still running then)."""
    running = list(processes)
    deadline = None
    while running and (deadline is None or time.monotonic() < deadline):
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        wait([process.sentinel for process in running], timeout)
        for process in [process for process in running if not process.is_alive()]:
            running.remove(process)
            stopped = process.exitcode in (128 + signal.SIGINT, 128 + signal.SIGTERM)  # the others end by themselves
            if process.exitcode and not stopped and deadline is None:
                deadline = time.monotonic() + GRACE
    return [process.exitcode for process in processes]


def _verdict(codes: list[int | None], reports: list[Connection], received: list[int]) -> int:
    """The run's exit code; raises what the user should read about a rank that failed.

    When one rank fails, the others fail after it because it no longer answers: by an exception, or aborted by the
    communication library. So what is told is, in this order: a message meant for the user, a rank that was killed, the
    traceback of the first rank that reported one, an abort.
    """
    if received:
        return 128 + received[0]
    said = []
    for report in reports:
        with contextlib.suppress(EOFError, OSError):
            if report.poll():
                said.append(report.recv())
    said.sort()
    for code, _, message, _ in said:
        if message:
            raise InputError(message) if code == -2 else RunError(message)
    killed = [(code == -signal.SIGABRT, rank, code) for rank, code in enumerate(codes) if code is not None and code < 0]
    aborted, rank, code = min(killed, default=(True, 0, 0))
    if said and aborted:
        sys.stderr.write(said[0][3])
        raise RunError(f"a rank failed with the exception above; all {len(codes)} ranks were stopped")
    if code:
        name = signal.Signals(-code).name
        raise RunError(f"rank {rank} was killed by {name}; all {len(codes)} ranks were stopped")
    return next((code for code in codes if code), 0)
