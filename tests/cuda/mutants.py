"""Small faults for csrc/cuda, to see whether the CPU run of the kernels would notice them."""

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


MUTANTS = [
    Mutant(
        "lrn_fwd",
        "an even window lies a channel off",
        "common/lrn.cuh",
        "before(window.size / 2)",
        "before((window.size - 1) / 2)",
    ),
    Mutant(
        "lrn_fwd",
        "the walk reads past its group",
        "common/lrn_fwd.cuh",
        "c + Halo + i < group_channels))",
        "c + Halo + i <= group_channels))",
    ),
    Mutant(
        "lrn_bwd",
        "the window is not mirrored",
        "common/lrn_bwd.cuh",
        "float sum[V], dx[V];\n      window_sums<Halo>(q, lrn.after, lrn.before, sum)",
        "float sum[V], dx[V];\n      window_sums<Halo>(q, lrn.before, lrn.after, sum)",
    ),
    Mutant(
        "lrn_bwd",
        "no barrier before the neighbours' sums are read",
        "common/lrn_bwd.cuh",
        "__syncthreads();\n    if (active && owned)",
        "if (active && owned)",
    ),
    Mutant(
        "lrn_bwd",
        "a chunk of channels writes one of the next",
        "common/lrn_bwd.cuh",
        "c + i < walk.end)",
        "c + i <= walk.end)",
    ),
    Mutant(
        "lrn_fwd",
        "a row of a tile lacks its last element",
        "common/lrn_planes.cuh",
        "has_single = single < width;",
        "has_single = single < width - 1;",
    ),
    Mutant(
        "lrn_fwd",
        "rows of a tile are taken to lie alike that do not",
        "common/lrn_planes.cuh",
        "step = ceil_div(warps, kVector<T>) * kVector<T>;",
        "step = warps;",
    ),
    Mutant(
        "lrn_fwd",
        "a tile's last channels have neighbours beyond their group",
        "common/lrn_planes.cuh",
        "clear(beyond, first + count);",
        "clear(beyond + 1, first + count);",
    ),
    Mutant(
        "lrn_fwd",
        "vectors of a tile begin before the tensor",
        "common/lrn_planes.cuh",
        "(from < tensor || from",
        "(from < tensor - V || from",
    ),
    Mutant(
        "lrn_bwd",
        "tiles are copied out before all of their pixels are there",
        "common/lrn_bwd.cuh",
        "__syncthreads();\n  tile.template put<kLanes>(dx_rows,",
        "tile.template put<kLanes>(dx_rows,",
    ),
    Mutant(
        "lrn_bwd",
        "the walk over a tile begins a step late",
        "common/lrn_bwd.cuh",
        "while (c < tile.begin) {",
        "while (c + Halo < tile.begin) {",
    ),
    Mutant(
        "max_pool_fwd", "of equal elements the last wins", "common/pool.cuh", "candidate > value", "candidate >= value"
    ),
    Mutant(
        "max_pool_fwd",
        "windows are not cut at the right edge",
        "common/pool_fwd.cuh",
        "j_end = min(k.kernel_w, shape.width - left)",
        "j_end = k.kernel_w",
    ),
    Mutant(
        "max_pool_fwd",
        "a pair's first column has the second one's place",
        "common/pool_fwd.cuh",
        "select_bits(equal_four(x[0].words, best.values, n), in_window[0],",
        "select_bits(equal_four(x[0].words, best.values, n), in_window[1],",
    ),
    Mutant(
        "max_pool_fwd",
        "a run in shared memory lacks its last element",
        "common/planes.cuh",
        "if (end + thread < count) {",
        "if (end + thread < count - 1) {",
    ),
    Mutant(
        "max_pool_fwd",
        "windows are compared before their planes have come",
        "common/planes.cuh",
        "async_wait<0>();\n  __syncthreads();",
        "async_wait<0>();",
    ),
    Mutant(
        "max_pool_fwd",
        "of a pair of planes the second has the first one's codes",
        "common/pool_fwd.cuh",
        "static_cast<uint8_t>(codes >> 16)",
        "static_cast<uint8_t>(codes)",
    ),
    Mutant(
        "max_pool_bwd",
        "columns of windows that share pixels add to them at once",
        "max_pool_bwd.cu",
        "__syncthreads();\n  }\n  along_run(",
        "}\n  along_run(",
    ),
    Mutant(
        "max_pool_bwd",
        "a block's first sums begin with what was there",
        "max_pool_bwd.cu",
        "at = planes.dx_at + 16 * threadIdx.x;",
        "at = planes.dx_at + 16 * threadIdx.x + 16;",
    ),
    Mutant(
        "max_pool_bwd",
        "a band's first windows are its own, and not one above",
        "max_pool_bwd.cu",
        "out_begin = max(band.begin - 1, 0)",
        "out_begin = max(band.begin, 0)",
    ),
    Mutant(
        "max_pool_bwd",
        "a window one column too wide",
        "max_pool_bwd.cu",
        "in_window + j * S < K",
        "in_window + j * S <= K",
    ),
    Mutant(
        "max_pool_bwd",
        "the first row is never written",
        "max_pool_bwd.cu",
        "if (h >= 0 && h < shape.height)",
        "if (h > 0 && h < shape.height)",
    ),
    Mutant("max_pool_bwd", "windows beyond the edge name pixels", "common/pool.cuh", "codes = nobody<V>();", ";"),
    Mutant(
        "max_pool_bwd",
        "a patch's right pixels take from the left window",
        "common/pool.cuh",
        "w + j * S < K && w < S; ++w",
        "w + j * S <= K && w < S; ++w",
    ),
    Mutant(
        "epilogue_fwd",
        "every channel gets the first one's bias",
        "common/source.cuh",
        "load<N>(bias + channel)",
        "load<N>(bias)",
    ),
    Mutant(
        "epilogue_fwd",
        "pooling does not wait for LRN",
        "common/lrn_pool_fwd.cuh",
        "__syncthreads();\n\n  // ---- Pool.",
        "",
    ),
    Mutant(
        "epilogue_fwd",
        "pooling in pairs does not wait for LRN",
        "common/lrn_pool_fwd.cuh",
        "__syncthreads();\n  if (!there) {",
        "if (!there) {",
    ),
    Mutant(
        "epilogue_fwd",
        "of equal floats in a window the last one counts",
        "common/lrn_pool_fwd.cuh",
        "int k = 7; k >= 0; --k) {\n      places[v] =",
        "int k = 0; k <= 7; ++k) {\n      places[v] =",
    ),
    Mutant(
        "epilogue_bwd",
        "a patch's neighbours are read before they have written",
        "common/lrn_pool_bwd.cuh",
        "__syncthreads();\n      float before",
        "float before",
    ),
    Mutant(
        "epilogue_fwd",
        "tiles of every group get the first one's bias",
        "common/lrn_planes.cuh",
        "local<V>(first_channel + channel)",
        "local<V>(channel)",
    ),
    Mutant(
        "epilogue_fwd",
        "LRN's output takes the ReLU's place before that is copied out",
        "common/lrn_fwd.cuh",
        "put<kRowLanes<T>>(own, source.kept());\n      __syncthreads();",
        "put<kRowLanes<T>>(own, source.kept());",
    ),
    Mutant(
        "epilogue_fwd",
        "a tile's pool begins before LRN is through with it",
        "common/lrn_pool_fwd.cuh",
        "x + pixel, lrn);\n  }\n  __syncthreads();",
        "x + pixel, lrn);\n  }",
    ),
    Mutant(
        "epilogue_fwd",
        "tiles keep no row that is in no window",
        "common/lrn_pool_fwd.cuh",
        "last ? tiles.x.pixels - first :",
        "last ? rows * S * shape.width :",
    ),
    Mutant(
        "epilogue_bwd",
        "db without a tile's last warp",
        "common/lrn_bwd.cuh",
        "of * 32 < tile.width",
        "of * 32 + 32 < tile.width",
    ),
    Mutant(
        "epilogue_bwd",
        "a tile's windows beyond the image name pixels",
        "common/lrn_pool_bwd.cuh",
        "x == near_x ? 0 : kNobody",
        "x == near_x ? 0 : 0 * kNobody",
    ),
    Mutant(
        "epilogue_bwd",
        "a tile's first windows are its own, and not one above",
        "common/lrn_pool_bwd.cuh",
        "out_begin = max(first_row / 2 - 1, 0)",
        "out_begin = max(first_row / 2, 0)",
    ),
    Mutant(
        "epilogue_bwd",
        "LRN does not wait for the gradient through the pool",
        "common/lrn_pool_bwd.cuh",
        "gradient, count);\n  __syncthreads();",
        "gradient, count);",
    ),
    Mutant("epilogue_bwd", "the mask lets 0 through", "epilogue_bwd.cu", "element(r, i) <= 0", "element(r, i) < 0"),
    Mutant(
        "epilogue_bwd",
        "db without the last row of partial sums",
        "common/sums.cuh",
        "row < rows; row += kSumRows",
        "row < rows - 1; row += kSumRows",
    ),
    Mutant(
        "epilogue_bwd",
        "a row of each warp's four is left out of db",
        "common/sums.cuh",
        "total += __shfl_xor_sync(0xffffffff, total, 16);",
        "",
    ),
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
        "the weight's gradient lacks each plane's last line",
        "lpips_layer_bwd.cu",
        "line < tiles.lines;",
        "line < tiles.lines - 1;",
    ),
    Mutant(
        "linear_int8_fwd",
        "weights have no sign",
        "linear_int8_fwd.cu",
        "return static_cast<int8_t>(pack.words[i / 4] >> (8 * (i % 4)))",
        "return static_cast<uint8_t>(pack.words[i / 4] >> (8 * (i % 4)))",
    ),
    Mutant(
        "linear_int8_fwd",
        "a pack's second half is multiplied by the first one's weights",
        "linear_int8_fwd.cu",
        "weight_of(weights, v + k)",
        "weight_of(weights, k)",
    ),
    Mutant(
        "linear_int8_fwd",
        "lanes past a row's last vector read on",
        "linear_int8_fwd.cu",
        "c < p.inputs; c += 32 * V",
        "c < p.inputs + V; c += 32 * V",
    ),
    Mutant(
        "linear_int8_fwd",
        "two halves of a warp are not added",
        "linear_int8_fwd.cu",
        "int step = 16; step > 0",
        "int step = 8; step > 0",
    ),
    Mutant(
        "linear_int8_fwd",
        "rows that are not there are read",
        "linear_int8_fwd.cu",
        "min(row + i, p.rows - 1)",
        "(row + i)",
    ),
    Mutant("linear_int8_fwd", "nobody waits for the kernel before", "linear_int8_fwd.cu", "  dependency_wait();\n", ""),
    Mutant("linear_int8_fwd", "rows that are not there are written", "linear_int8_fwd.cu", " && row + i < p.rows", ""),
    Mutant(
        "linear_int8_fwd",
        "the bias is scaled too",
        "linear_int8_fwd.cu",
        "p.scales[output] * sums[i] + bias",
        "p.scales[output] * (sums[i] + bias)",
    ),
    Mutant(
        "linear_int8_fwd",
        "whether x is aligned is not asked",
        "linear_int8_fwd.cu",
        "p.inputs % 16 == 0 && aligned_16(p.x) && aligned_16(p.weight)",
        "p.inputs % 16 == 0 && aligned_16(p.weight)",
    ),
]

FWD, BWD, STAGE = "sm90/conv_relu_fwd.cu", "sm90/conv_relu_bwd.cu", "sm90/conv_stage_fwd.cu"
SHARED, WALK = "common/conv_sm90_fwd.cuh", "common/conv_sm90.cuh"
SM90_MUTANTS = [
    Mutant("sm90::conv_relu_fwd", "a stage is given back while products read it", SHARED, "wgmma_wait<1>();", ""),
    Mutant(
        "sm90::conv_relu_fwd",
        "the last sixteen of a slab's depth are left out",
        SHARED,
        "step < Tile::kSteps;",
        "step < Tile::kSteps - 1;",
    ),
    Mutant(
        "sm90::conv_relu_fwd",
        "a consumer's second 64 rows are its first",
        SHARED,
        "rows + (j * 64 * kLine >> 4)",
        "rows",
    ),
    Mutant("sm90::conv_relu_fwd", "a pair of columns has one bias", SHARED, "+ e % 2;", ";"),
    Mutant("sm90::conv_relu_fwd", "nobody waits for the kernel before", SHARED, "  dependency_wait();\n", ""),
    Mutant(
        "sm90::conv_relu_fwd",
        "the pieces' sum waits for one of them alone",
        FWD,
        "dependency_wait();\n  launch_dependents();\n  const int64_t at",
        "if (threadIdx.x == 0) {\n    dependency_wait();\n  }\n  const int64_t at",
    ),
    Mutant(
        "sm90::conv_relu_fwd",
        "what is cut begins with the first pixel",
        FWD,
        "at.pixel = first +",
        "at.pixel =",
    ),
    Mutant(
        "sm90::conv_relu_fwd",
        "pieces of the depth overlap by a step",
        FWD,
        "static_cast<int32_t>(blockIdx.y) * steps_each;",
        "static_cast<int32_t>(blockIdx.y) * (steps_each - 1);",
    ),
    Mutant(
        "sm90::conv_relu_fwd",
        "the last piece is added for those that are not there",
        FWD,
        "first + k < args.splits ? element(pieces[k], i) : 0",
        "element(pieces[k], i)",
    ),
    Mutant(
        "sm90::conv_relu_fwd",
        "pieces lie where the first one lies",
        FWD,
        "args.partial + blockIdx.y *",
        "args.partial + 0 *",
    ),
    Mutant("sm90::conv_relu_fwd", "no proxy fence before the bulk store", FWD, "async_proxy_fence();\n", "\n"),
    Mutant(
        "sm90::conv_relu_fwd",
        "a piece is written while it is stored",
        FWD,
        "bulk_wait_read<kPieces - 1>();",
        "bulk_wait_read<kPieces>();",
    ),
    Mutant(
        "sm90::conv_stage_fwd",
        "the ring is a row too short",
        STAGE,
        "(Tile::kRows - 2) / width + 4",
        "(Tile::kRows - 2) / width + 3",
    ),
    Mutant(
        "sm90::conv_stage_fwd",
        "rows are pooled before all warps have written them",
        STAGE,
        "mbarrier_wait(&barriers.written, parity);",
        "",
    ),
    Mutant(
        "sm90::conv_stage_fwd",
        "a tile is written over rows that are being pooled",
        STAGE,
        "mbarrier_wait(&barriers.pooled, parity ^ 1);",
        "",
    ),
    Mutant(
        "sm90::conv_stage_fwd",
        "a row is pooled before its window is there",
        STAGE,
        "(whole - K + S) / S",
        "(whole - K + S + 1) / S",
    ),
    Mutant(
        "sm90::conv_stage_fwd",
        "a band lacks the row that the next one begins with",
        STAGE,
        "((at.rows - 1) * S + K) * width",
        "at.rows * S * width",
    ),
    Mutant(
        "sm90::conv_relu_fwd",
        "the window's columns are not dilated",
        WALK,
        "static_cast<uint16_t>(s * dilation_w)",
        "static_cast<uint16_t>(s)",
    ),
    Mutant(
        "sm90::conv_relu_fwd",
        "float32 is cut off, not rounded",
        WALK,
        "operand_elements(DType dtype) { return dtype == DType::f32 ? Elements::tf32 :",
        "operand_elements(DType dtype) { return dtype == DType::f32 ? Elements::bits32 :",
    ),
    Mutant(
        "sm90::conv_relu_fwd",
        "odd rows of float32 are in the order of even ones",
        SHARED,
        "8 * (odd ? chunk ^ 2 : chunk)",
        "8 * chunk",
    ),
    Mutant(
        "sm90::conv_relu_fwd",
        "float32's lower rows go where the upper ones are",
        SHARED,
        "at(lane / 4 + 8 * half,",
        "at(lane / 4,",
    ),
    Mutant(
        "sm90::conv_relu_fwd",
        "a stage of float32 is as deep as one of 16 bits",
        SHARED,
        "kDepth = kMmaDepth<T> * kSteps;",
        "kDepth = 16 * kSteps;",
    ),
    Mutant(
        "sm90::conv_relu_fwd",
        "nobody asks whether float32 may be rounded",
        SHARED,
        "(dtype != DType::f32 || allow_tf32) && ",
        "(allow_tf32 || !allow_tf32) && ",
    ),
    Mutant(
        "sm90::conv_stage_fwd",
        "float32's windows are gone through by columns",
        STAGE,
        "best[c].take(element(x[k / K][k % K], c), k);",
        "best[c].take(element(x[k % K][k / K], c), k);",
    ),
    Mutant(
        "sm90::conv_relu_bwd",
        "every group is masked by the first one",
        FWD,
        "static_cast<const T*>(args.mask) + int64_t{group} * args.columns + column + within;",
        "static_cast<const T*>(args.mask) + int64_t{group} * 0 + column + within;",
        unit="sm90::conv_relu_fwd",
    ),
    Mutant(
        "sm90::conv_relu_bwd",
        "a piece is masked before all lanes have written it",
        FWD,
        "__syncwarp();\n          mask_piece",
        "mask_piece",
        unit="sm90::conv_relu_fwd",
    ),
    Mutant(
        "sm90::conv_relu_bwd",
        "what is cut is masked as from the first pixel on",
        FWD,
        "static_cast<const T*>(c.mask) + split.first * channels",
        "static_cast<const T*>(c.mask)",
        unit="sm90::conv_relu_fwd",
    ),
    Mutant(
        "sm90::conv_relu_bwd",
        "dx is masked and nobody asked",
        BWD,
        "p.mask_dx ? p.x : nullptr;",
        "p.x;",
    ),
    Mutant(
        "sm90::conv_relu_bwd",
        "the last pixels are left out",
        BWD,
        "min(begin + args.stages_each, args.stages)",
        "min(begin + args.stages_each, args.stages - 1)",
    ),
    Mutant(
        "sm90::conv_relu_bwd",
        "a group's last channels run into the next tap",
        BWD,
        "column.channel + channel < args.channels",
        "column.channel + channel <= args.channels",
    ),
    Mutant(
        "sm90::conv_relu_bwd",
        "blocks of columns lie where the first one lies",
        BWD,
        "matrix_descriptor(stage + kConsumers * kBox, kBox)",
        "matrix_descriptor(stage + kConsumers * kBox)",
    ),
]
