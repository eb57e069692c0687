"""What a card takes of a launch: csrc/host_simt/limits.h in Python, and the limits that need the real compile."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

KB = 1024
SOURCE = (Path(__file__).parents[2] / "csrc/host_simt/limits.h").read_text()


def constant(name: str) -> int:
    return int(re.search(rf"constexpr int64_t {name} = (\d+);", SOURCE)[1])


@dataclass(frozen=True)
class Multiprocessor:
    """The limits of one architecture."""

    threads: int
    blocks: int
    shared: int  # bytes, for all blocks together
    block_shared: int  # bytes a block may ask for


MULTIPROCESSORS = {
    int(sm): Multiprocessor(int(threads), int(blocks), int(shared) * KB, int(block_shared) * KB)
    for sm, threads, blocks, shared, block_shared in re.findall(r"X\((\d+), (\d+), (\d+), (\d+), (\d+)\)", SOURCE)
}
BLOCK_THREADS, REGISTERS = constant("kBlockThreads"), constant("kRegisters")
SHARED, RESERVED = constant("kSharedBytes"), constant("kReservedBytes")


def block_registers(threads: int, registers: int) -> int:
    """Registers of a whole block: a warp's come in pieces of 256, and a block consists of whole warps."""
    return -(-threads // 32) * -(-registers * 32 // 256) * 256


def refusals(
    name: str, architecture: int, threads: int, most_threads: int, registers: int, static: int, dynamic: int
) -> list[str]:
    """Why that architecture refuses blocks of ``threads`` of the kernel, compiled for ``most_threads`` at most, with
    so many registers a thread and so much shared memory. Each reason names kernel, block and number."""
    block = f"{name}, sm_{architecture}, blocks of {threads} threads"
    limits, taken = MULTIPROCESSORS[architecture], block_registers(threads, registers)
    found = []
    if threads > min(most_threads, BLOCK_THREADS):
        found.append(f"{block}: compiled for {most_threads}, and a card takes {BLOCK_THREADS}")
    if taken > REGISTERS:
        found.append(f"{block}: {registers} registers a thread are {taken} a block, and there are {REGISTERS}")
    if static > SHARED:
        found.append(f"{block}: {static} bytes of static shared memory, and nobody can ask for more than {SHARED}")
    if static + dynamic > limits.block_shared:
        found.append(f"{block}: {static} static and {dynamic} dynamic bytes of {limits.block_shared} of shared memory")
    return found
