"""Reads every CUDA kernel's machine code back out of the built extension, and what it takes of a multiprocessor.

cuobjdump lists registers, shared memory and the launch bounds of each kernel, nvdisasm its instructions. Both come from
PyPI (the extra ``dev``) or with a CUDA toolkit in PATH. No GPU is needed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

from alexnet_fast import _C

from .limits import KB, MULTIPROCESSORS, REGISTERS, RESERVED

ARCHITECTURES = 80, 86, 90  # there is machine code for; sm_89 runs that of sm_86


def resident_blocks(architecture: int, threads: int, registers: int, shared: int) -> int:
    """How many such blocks a multiprocessor holds at once, as cudaOccupancyMaxActiveBlocksPerMultiprocessor has it.

    A warp's registers come in pieces of 256, out of its quarter; a block's shared memory in pieces of 128 bytes.
    """
    limits = MULTIPROCESSORS[architecture]
    warps = -(-threads // 32)
    of_registers = 4 * (REGISTERS // 4 // (-(-registers * 32 // 256) * 256)) // warps
    of_shared = limits.shared // (-(-(shared + RESERVED) // 128) * 128)
    return min(limits.threads // (32 * warps), limits.blocks, of_registers, of_shared)


@dataclass(frozen=True)
class Kernel:
    """One instantiation for one architecture."""

    name: str  # without namespaces: lrn_fwd_nhwc<float, 4, 2, Plain<float> >
    architecture: int
    threads: int  # of a block, at most
    registers: int  # of a thread
    stack: int  # bytes of a thread that are not in registers
    shared: int  # bytes, known when compiled
    instructions: Counter[str] = field(repr=False)
    loops: tuple[int, ...] = field(default=(), repr=False)  # how many instructions each has

    @property
    def family(self) -> str:
        return self.name.partition("<")[0]

    @property
    def hopper(self) -> bool:
        """Whether the kernel is for sm_90a alone, that is from csrc/cuda/sm90."""
        return self.name.startswith("sm90::")

    @property
    def arguments(self) -> list[str]:
        """The template's arguments: the numbers and names in them, from left to right."""
        return re.findall(r"\w+", self.name)[1:]

    @property
    def vector(self) -> int:
        """Bytes that a thread of a pointwise kernel moves at once."""
        dtype, elements, *_ = [*self.arguments, ""]
        return int(elements) * (4 if dtype == "float" else 2) if elements.isdigit() else 0

    def dynamic(self, mask: bool = False) -> int:
        """Bytes of shared memory that a launch asks for: the most there is, but for convolutions without ``mask``."""
        if self.family == "lrn_pool_fwd_planes":
            return 55 * KB  # LrnPoolPlanes::kMostBytes
        if self.family in ("lrn_pool_fwd", "lrn_pool_fwd_packed"):
            return 40 * KB  # kTileBytes
        if self.family == "lrn_fwd_planes":  # rows of a tile: up to 96 channels of 16 bits, and what lies beside them
            beside = 4 if "LrnOfFive" in self.name else 16
            return (48 + beside) * 540 if self.arguments[0] == "float" else (96 + beside) * 270
        if self.family == "lrn_bwd_planes_any":
            return 40 * KB  # PlaneTiles::kTileBytes
        if self.family == "lrn_bwd_planes":  # rows of x and dy of a chunk, wherever they begin within 16 bytes
            return (40 + 36) * 134 * 4 if self.arguments[0] == "float" else (56 + 52) * 142 * 2
        if self.family == "lrn_pool_bwd_planes":
            return 76 * KB  # LrnPoolTiles::kMostBytes
        if self.family in ("lpips_fwd_planes", "lpips_bwd_planes"):  # a thread's lines of two images, and two sums
            return 256 * (8 * 32 + 2 * (16 if self.arguments[0] == "float" else 32))
        if self.family == "pool_fwd_planes":
            return 35 * KB // 2  # PlaneBands::kTileBytes
        if self.family == "pool_bwd_planes":
            return 32 * KB  # WindowPlanes::kTileBytes
        if self.hopper:  # stages of 128-byte lines, two pieces of 2 KB for each of eight warps, the first one's place
            if self.family == "sm90::conv_weight_gradient":
                return 5 * 5 * 8 * KB + KB  # five stages of five boxes
            if self.family == "sm90::conv_stage_fwd":
                return 226 * KB  # kSharedLimit
            if self.family == "sm90::conv_add_splits":
                return 0
            if self.family == "sm90::conv_first_fwd":  # two sets of 9 taps, two rings of six rows, in whole lines
                row = 6 * 16 * (int(self.arguments[-3]) + 2)
                return 2 * 9 * 8 * KB + 2 * 6 * -(-row // 128) * 128 + KB
            height, columns, stages = map(int, self.arguments[-4:-1])
            pieces = 0 if self.family == "sm90::conv_split_fwd" else 8 * 2 * 2 * KB
            return stages * 128 * (128 * height + columns) + pieces + KB
        if not self.family.startswith("conv_") or "Tile" not in self.name:
            return 0
        rows, columns, _, _, stages = map(int, re.findall(r"\d+(?=[,>])", self.name)[-5:])
        ring = stages * 64 * (rows + columns + (rows if mask else 0))  # a slab is 64 bytes deep
        if self.family != "conv_stage_fwd":
            return ring
        # AlexNet's first stage, where the launcher takes it: a tile and three rows of 55 pixels of the convolution's
        # output, each pixel eight elements longer than the tile is wide.
        output = (rows + 3 * 55 - 1) * (columns + 8) * (4 if re.search("float|MultiplyAdd", self.name) else 2)
        return min(ring + output, 95 * KB)  # kSharedLimit

    @property
    def blocks(self) -> int:
        return resident_blocks(self.architecture, self.threads, self.registers, self.shared + self.dynamic())

    @property
    def occupancy(self) -> float:
        """Warps that a multiprocessor holds at once, of those it can hold."""
        return self.blocks * (-(-self.threads // 32) * 32) / MULTIPROCESSORS[self.architecture].threads


# ---- Tools -----------------------------------------------------------------------------------------------------------


@cache
def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: from its package, else from PATH."""
    try:
        files = metadata.files(f"nvidia-cuda-{name}") or []
    except metadata.PackageNotFoundError:
        files = []
    return next((str(file.locate()) for file in files if file.name == name), shutil.which(name))


def missing() -> str | None:
    """Why there is no machine code to read here, or None."""
    if _C.build_info()["cuda"] is None:
        return "the extension was built without CUDA"
    lacking = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    lacking += [] if shutil.which("c++filt") else ["c++filt (binutils)"]
    return f"not installed: {', '.join(lacking)}" if lacking else None


def output(*command: str | Path, **options) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


def resource_usage(file: str | Path, cuobjdump: str) -> dict[str, dict[str, int]]:
    """Mangled name -> REG, STACK, SHARED and LOCAL of each kernel in a cubin."""
    report = output(cuobjdump, "--dump-resource-usage", file)
    functions = re.findall(r"Function (\S+):\n *(.*)", report)
    return {name: {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)} for name, line in functions}


# ---- Reading ---------------------------------------------------------------------------------------------------------


def short(demangled: str) -> str:
    return re.sub(r"alexnet_fast::cuda::|\(anonymous namespace\)::|^void ", "", demangled).split("(")[0]


LINE = re.compile(
    r"^(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/ +(?:@!?U?P[0-9T] +)?([A-Z][A-Z0-9_.x]*)(?:[^\n`]*`\((\.L_x_\d+)\))?",
    re.MULTILINE,
)


def disassemble(cubin: Path) -> dict[str, tuple[Counter[str], tuple[int, ...]]]:
    """Mangled name -> how often each instruction occurs, with its modifiers, and the lengths of loops: from where a
    branch goes back to up to the branch."""
    _, *parts = re.split(r"^//-+ \.text\.(\S+) -+$", output(tool("nvdisasm"), "-c", cubin), flags=re.MULTILINE)
    found = {}
    for name, code in zip(parts[::2], parts[1::2], strict=True):
        instructions, labels, loops = [], {}, []
        for label, instruction, target in LINE.findall(code):
            if label:
                labels[label] = len(instructions)
                continue
            instructions.append(instruction)
            if instruction == "BRA" and target in labels:
                loops.append(len(instructions) - labels[target])
        found[name] = Counter(instructions), tuple(loops)
    return found


def kernels_of(cubin: Path) -> Iterator[Kernel]:
    architecture = int(re.search(r"\.sm_(\d+)", cubin.name)[1])
    usage = resource_usage(cubin, tool("cuobjdump"))
    _, *parts = re.split(r"^\.nv\.info\.(\S+)$", output(tool("cuobjdump"), "--dump-elf", cubin), flags=re.MULTILINE)
    bounds = {
        name: [int(side, 16) for side in found[1].split()]
        for name, section in zip(parts[::2], parts[1::2], strict=True)
        if (found := re.search(r"EIATTR_MAX_THREADS\n.*\n\s*Value:\s*(.*)", section))
    }
    instructions = disassemble(cubin)
    names = output("c++filt", input="\n".join(usage)).splitlines()
    for (mangled, used), name in zip(usage.items(), names, strict=True):
        x, y, z = bounds[mangled]
        # From sm_90 on the report counts what the system reserves.
        shared = max(used["SHARED"] - RESERVED, 0) if architecture >= 90 else used["SHARED"]
        stack = used["STACK"] + used["LOCAL"]
        yield Kernel(short(name), architecture, x * y * z, used["REG"], stack, shared, *instructions[mangled])


@cache
def kernels() -> list[Kernel]:
    """All kernels of the built extension, for all architectures."""
    with tempfile.TemporaryDirectory() as folder:
        output(tool("cuobjdump"), "--extract-elf", "all", Path(_C.__file__).resolve(), cwd=folder)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(lambda cubin: list(kernels_of(cubin)), sorted(Path(folder).glob("*.cubin")))
            return sorted((kernel for some in found for kernel in some), key=lambda k: (k.name, k.architecture))


def ptx_targets() -> set[str]:
    """Architectures for which the extension holds PTX, which drivers compile for later ones."""
    return set(re.findall(r"\.(sm_\w+)\.ptx", output(tool("cuobjdump"), "--list-ptx", _C.__file__)))


# ---- A table ---------------------------------------------------------------------------------------------------------


def span(values: list[float], unit: float = 1) -> str:
    low, high = round(min(values) / unit), round(max(values) / unit)
    return str(low) if low == high else f"{low}–{high}"


def table(found: list[Kernel]) -> list[str]:
    """A line for each family of kernels: over its instantiations, threads and KB of shared memory of a block, and on
    each architecture registers of a thread, blocks that fit a multiprocessor, and warps in % of what it can hold."""
    lines = [
        f"{'':36}" + "".join(f"{f'sm_{architecture}':>24}" for architecture in ARCHITECTURES),
        f"{'kernel':22}{'threads':>8}{'KB':>6}" + f"{'regs':>10}{'blocks':>7}{'%':>7}" * len(ARCHITECTURES),
    ]
    for family in sorted({kernel.family for kernel in found}):
        rows = [kernel for kernel in found if kernel.family == family]
        shared = [kernel.shared + kernel.dynamic() for kernel in rows]
        line = f"{family:22}{span([kernel.threads for kernel in rows]):>8}{span(shared, KB):>6}"
        for architecture in ARCHITECTURES:
            here = [kernel for kernel in rows if kernel.architecture == architecture]
            if not here:  # Hopper's kernels are for it alone
                line += " " * 24
                continue
            line += f"{span([k.registers for k in here]):>10}{span([k.blocks for k in here]):>7}"
            line += f"{span([100 * k.occupancy for k in here]):>7}"
        lines.append(line)
    return lines
