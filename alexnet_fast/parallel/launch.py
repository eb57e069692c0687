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
from multiprocessing.connection import Connection, wait

from alexnet_fast.errors import InputError, RunError
from alexnet_fast.parallel.ranks import joined

GRACE = 0.5  # seconds in which ranks that fail together may say why


def ranks_given() -> bool:
    """Whether a launcher such as torchrun started this process as one rank of many."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(worker: Callable[..., int], args: tuple, nproc: int) -> int:
    """Runs ``worker(ranks, *args)`` on every rank and returns the run's exit code.

    Under torchrun this process is one of the ranks; otherwise ``nproc`` processes are started here (one: this process
    itself). Raises what a rank raised as :class:`InputError` or :class:`RunError`. SIGINT and SIGTERM are passed on to
    the ranks once; a second one kills them.
    """
    if ranks_given():
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        with joined(rank, world, local_rank, local_world, "env://") as ranks:
            return worker(ranks, *args)
    if nproc == 1:
        with joined(0, 1, 0, 1, "") as ranks:
            return worker(ranks, *args)
    # Gradients are allocated anew at each step (fc6's is 151 MB); huge pages cut the page faults of that by ten.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    context = multiprocessing.get_context("spawn")
    lifeline, held = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="alexnet-fast-") as meeting:
        processes, reports = [], []
        for rank in range(nproc):
            report, told = context.Pipe(duplex=False)
            address = f"file://{meeting}/ranks"
            process = context.Process(target=_rank, args=(worker, args, rank, nproc, address, lifeline, told))
            process.start()
            told.close()
            processes.append(process)
            reports.append(report)
        lifeline.close()
        try:
            with _passed_on(processes) as received:
                codes = _watch(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
            held.close()
    return _verdict(codes, reports, received)


def _rank(worker, args, rank: int, nproc: int, address: str, lifeline: Connection, told: Connection) -> None:
    threading.Thread(target=_end_with_launcher, args=(lifeline,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the launcher passes it on as SIGTERM
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    try:
        with joined(rank, nproc, rank, nproc, address) as ranks:
            code = worker(ranks, *args)
    except Exception as error:
        code = 2 if isinstance(error, InputError) else 1
        said = isinstance(error, (InputError, RunError))
        told.send((-code, time.monotonic(), str(error) if said else "", "" if said else traceback.format_exc()))
    # Without Python's finalization, which ends a thread of the communication library that asks for the interpreter by
    # then: a rank that had done its work was once seen to end in "terminate called without an active exception".
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
            process.terminate() if len(received) == 1 else process.kill()

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

    When one rank fails the others fail after it, for want of an answer: with an exception, or aborted by the
    communication library. So a message meant for the user comes first, then a rank that was killed, then the traceback
    of the first that reported one, and an abort last.
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
