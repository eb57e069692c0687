"""Small faults for csrc/cuda, to see whether the CPU run of the kernels would notice them. Those for LRN and pooling
are in mutants_pointwise.py, those for Hopper in mutants_sm90.py."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from . import host_build


@dataclass(frozen=True)
class Mutant:
    """``text`` in ``file`` (of csrc/cuda) becomes ``instead``. One kernel file is compiled so, ``unit``, by default
    that of ``launcher``, which is what is then run."""

    launcher: str
    fault: str
    file: str
    text: str
    instead: str
    unit: str | None = None

    def __str__(self) -> str:
        return f"{self.launcher}: {self.fault}"

    def program(self, folder: Path) -> Path:
        """Builds the runner, of the build ``threads``, with the fault in it. ``folder`` takes the changed sources."""
        csrc = folder / "csrc"
        shutil.copytree(host_build.CSRC, csrc)
        path = csrc / "cuda" / self.file
        source = path.read_text()
        if source.count(self.text) != 1:
            raise ValueError(f"{self}: {self.text!r} is {source.count(self.text)} times in {self.file}, expected once")
        path.write_text(source.replace(self.text, self.instead))
        return host_build.build("threads", changed={self.unit or self.launcher: csrc})


LINEAR = "common/linear.cuh"
OTHER_MUTANTS = [
    Mutant(
        "conv_relu_fwd",
        "the row below the image is inside",
        "common/conv_gather.cuh",
        "< static_cast<uint32_t>(height)",
        "<= static_cast<uint32_t>(height)",
    ),
    Mutant(
        "conv_relu_fwd",
        "a slab is multiplied before it has come",
        "conv_relu_fwd.cu",
        "async_wait<Tile::kStages - 2>()",
        "async_wait<Tile::kStages - 1>()",
    ),
    Mutant(
        "conv_relu_fwd",
        "a folded pixel from below the image",
        "conv_prepare.cu",
        "static_cast<uint32_t>(h) < static_cast<uint32_t>(shape.in_height)",
        "static_cast<uint32_t>(h) <= static_cast<uint32_t>(shape.in_height)",
        unit="conv_prepare",
    ),
    Mutant(
        "conv_relu_fwd",
        "a folded pixel from the left of the image",
        "conv_prepare.cu",
        "first = min(max(-w, 0), shape.run_pixels)",
        "first = 0",
        unit="conv_prepare",
    ),
    Mutant(
        "conv_relu_fwd",
        "a prepared weight is prepared again",
        "common/conv.cuh",
        "return !p.prepared && (folded",
        "return (folded",
    ),
    Mutant(
        "conv_relu_bwd",
        "the kernel is transposed and not rotated",
        "conv_prepare.cu",
        "turned = taps - 1 - tap",
        "turned = tap",
        unit="conv_prepare",
    ),
    Mutant(
        "conv_relu_bwd",
        "one split of the pixels is left out",
        "conv_prepare.cu",
        "for (int32_t split = 0;",
        "for (int32_t split = 1;",
        unit="conv_prepare",
    ),
    Mutant(
        "conv_stage_fwd",
        "a row is pooled before its window is there",
        "conv_stage_fwd.cu",
        "free / args.pool.stride_h + 1",
        "free / args.pool.stride_h + 2",
    ),
    Mutant(
        "conv_stage_fwd",
        "codes count by the window's height",
        "conv_stage_fwd.cu",
        "(h - top) * args.pool.kernel_w",
        "(h - top) * args.pool.kernel_h",
    ),
    Mutant(
        "lpips_layer_fwd",
        "lines of every plane begin alike",
        "common/lpips_planes.cuh",
        "lead(origin()) + j * lie.pixels",
        "lead(origin())",
    ),
    Mutant(
        "lpips_layer_fwd",
        "lines are read before they have come",
        "common/lpips_planes.cuh",
        "async_wait<0>();",
        "",
    ),
    Mutant(
        "lpips_layer_bwd",
        "pixels are summed before all rows are there",
        "common/lpips_planes.cuh",
        "__syncthreads();\n    int32_t before[V]",
        "int32_t before[V]",
    ),
    Mutant(
        "lpips_layer_bwd",
        "a run's last line is written whole",
        "common/lpips_planes.cuh",
        "pixel >= 0 && pixel + V <= count",
        "pixel >= 0 && pixel < count",
    ),
    Mutant(
        "lpips_layer_bwd",
        "a run's ends are written before all lines are there",
        "common/lpips_planes.cuh",
        "void put_ends(T* to) const {\n    __syncthreads();",
        "void put_ends(T* to) const {",
    ),
    Mutant(
        "lpips_layer_bwd",
        "single elements after a run's last line are not written",
        "common/lpips_planes.cuh",
        "singles = head + count - tail;",
        "singles = head;",
    ),
    Mutant(
        "lpips_layer_bwd",
        "what lies before a run is nobody's number",
        "common/lpips_planes.cuh",
        "if (thread < V) {\n      ((numbers",
        "if (thread < 0) {\n      ((numbers",
    ),
    Mutant(
        "lpips_layer_bwd",
        "the weight's gradient lacks each plane's last line",
        "lpips_layer_bwd.cu",
        "line < tiles.lines;",
        "line < tiles.lines - 1;",
    ),
    Mutant(
        "linear_int8_fwd",
        "weights have no sign",
        LINEAR,
        "return static_cast<int8_t>(pack.words[i / 4] >> (8 * (i % 4)))",
        "return static_cast<uint8_t>(pack.words[i / 4] >> (8 * (i % 4)))",
    ),
    Mutant(
        "linear_int8_fwd",
        "a pack's second half is multiplied by the first one's weights",
        LINEAR,
        "element(weights[j], v + k)",
        "element(weights[j], k)",
    ),
    Mutant("linear_int8_fwd", "lanes past a row's last vector read on", LINEAR, "c < inputs;", "c < inputs + V;"),
    Mutant("linear_int8_fwd", "two halves of a warp are not added", LINEAR, "int step = 16;", "int step = 8;"),
    Mutant("linear_int8_fwd", "rows that are not there are read", LINEAR, "min(row + i, p.rows - 1)", "(row + i)"),
    Mutant("linear_int8_fwd", "nobody waits for the kernel before", LINEAR, "  dependency_wait();\n", ""),
    Mutant("linear_int8_fwd", "rows that are not there are written", LINEAR, " && at_row < p.rows", ""),
    Mutant("linear_int8_fwd", "the bias is scaled too", LINEAR, "* mine + bias", "* (mine + bias)"),
    Mutant(
        "linear_int8_fwd",
        "whether x is aligned is not asked",
        LINEAR,
        "p.inputs % V != 0 || !aligned_16(p.x) || !aligned_16(p.weight)",
        "p.inputs % V != 0 || !aligned_16(p.weight)",
    ),
    Mutant(
        "linear_relu_fwd",
        "outputs that are not there are read",
        LINEAR,
        "min(output + j, p.outputs - 1)",
        "(output + j)",
    ),
    Mutant("linear_relu_fwd", "outputs that are not there are written", LINEAR, " && at_output < p.outputs", ""),
    Mutant(
        "linear_relu_fwd",
        "a lane writes its neighbour's output",
        LINEAR,
        "output + lane % kLinearOutputs",
        "output + (lane + 1) % kLinearOutputs",
    ),
    Mutant("linear_relu_fwd", "NaN becomes zero", LINEAR, "p.relu && y <= 0", "p.relu && !(y > 0)"),
    Mutant("linear_relu_fwd", "ReLU is never left out", LINEAR, "p.relu && y <= 0", "y <= 0"),
    Mutant(
        "linear_relu_fwd",
        "of more than eight rows the first ones come again",
        LINEAR,
        "x[i] = p.x + min(row + i,",
        "x[i] = p.x + min(int64_t{i},",
    ),
]
