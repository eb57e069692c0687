"""What each CUDA kernel may take of a multiprocessor, and why. The first row that fits a kernel's name counts.

Pointwise kernels live from loads in flight: 4.8 TB/s at 700 ns are 3.4 MB, 25 KB for each of 132 multiprocessors. A
block of 256 threads with one load of 16 bytes each has 4 KB in flight, so it takes six such blocks, three with two
loads a thread, two with three or more. 65,536 registers are six blocks of 40 a thread, four of 64, three of 80, two
of 128.

Convolutions live from their accumulators: a warp's tile of 64 x 64 has 128 of them in each lane, and its fragments,
addresses and the bias take as many again. Two blocks a multiprocessor, so that one multiplies while the other waits at
a barrier, where shared memory has room for their rings: not on sm_86, with 100 KB.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .limits import KB, MULTIPROCESSORS
from .machine_code import ARCHITECTURES, Kernel


@dataclass(frozen=True)
class Budget:
    kernels: str  # a regular expression for the beginning of a kernel's name
    registers: int
    shared: int  # bytes of a block: static, dynamic, and with the mask where there is one
    blocks: tuple[int, int, int]  # that fit a multiprocessor of sm_80, sm_86 and sm_90, at least
    instructions: int | None = None  # in the whole kernel; convolutions' are products first of all


BUDGETS = [
    # Six blocks: one load of z, r or dy a thread and unit, two units unrolled in NHWC.
    Budget("relu_(nhwc|nchw|bwd_nhwc)<", 48, 10 * KB, (5, 5, 5), 750),
    Budget("relu_bwd_nchw<", 48, 2 * KB, (5, 5, 5), 630),
    # A strip's nine or fifteen loads need no company; its windows' maxima and places are 2 x 2 x V registers.
    Budget("pool_fwd_strips<", 96, 0, (2, 2, 2), 880),
    # Half of the warps: what this lacked at 111 registers were warps. 1,312 instructions, when elements were floats.
    Budget(r"pool_fwd_packed<\w+, \d, \d, false,", 64, 0, (4, 4, 4), 640),
    Budget("pool_fwd_packed<", 64, 0, (4, 4, 4), 960),
    Budget("pool_fwd_any<", 72, 0, (3, 3, 3), 820),
    # NCHW planes in shared memory, blocks of 96 threads: two planes of 55 x 55 in 16 bits and what becomes of them.
    # Copies at both ends, which each thread issues once, are most of the instructions.
    Budget("pool_fwd_planes<float, 3, 2, false, false,", 48, 18 * KB, (8, 5, 12), 340),
    Budget("pool_fwd_planes<float, 3, 2, true, false,", 48, 18 * KB, (8, 5, 12), 420),
    Budget("pool_fwd_planes<float,", 48, 18 * KB, (8, 5, 12), 550),
    Budget(r"pool_fwd_planes<\w+, 3, 2, false, false,", 48, 18 * KB, (8, 5, 12), 440),
    Budget(r"pool_fwd_planes<\w+, 3, 2, true, false,", 48, 18 * KB, (8, 5, 12), 560),
    Budget("pool_fwd_planes<", 48, 18 * KB, (8, 5, 12), 600),
    # Backward two planes of float32 sums.
    Budget(r"pool_bwd_planes<\w+, false>", 48, 32 * KB, (4, 2, 6), 450),
    Budget("pool_bwd_planes<", 56, 32 * KB, (4, 2, 6), 650),
    Budget("pool_bwd_strips<", 64, 1 * KB, (4, 4, 4), 570),
    # Sums of 2 x 2 pixels of V channels, and as many loads in flight as they leave room for; with sums for the bias V
    # registers more. The loop has 11 instructions an input of 16 bits; it was 21 in strips, with 920 in all.
    Budget(r"pool_bwd_patches<\w+, \d, false>", 64, 0, (4, 4, 4), 430),
    Budget("pool_bwd_patches<", 80, 9 * KB, (3, 3, 3), 590),
    Budget("pool_bwd_any<", 80, 9 * KB, (3, 3, 3), 820),
    # One load and its halo; wide windows read 24 channels for 8.
    Budget(r"lrn_fwd_nhwc<\w+, \d, 2, LrnOfFive,", 48, 0, (5, 5, 5), 230),
    Budget(r"lrn_fwd_nhwc<\w+, \d, 2,", 56, 0, (4, 4, 4), 450),
    Budget("lrn_fwd_nhwc<", 64, 0, (4, 4, 4), 570),
    # The walk keeps 2 Halo + 4 channels of up to 8 pixels, four or eight of them in flight.
    Budget("lrn_fwd_nchw<", 128, 0, (2, 2, 2), 3250),
    # Tiles of planes in shared memory: warps enough to compute while others' copies come. What bounds them is how many
    # instructions they issue, lrn_fwd.cu and lrn_bwd.cu have the arithmetic; windows that are not AlexNet's have a halo
    # of 8, and code for every power.
    Budget("lrn_fwd_planes<float, LrnOfFive, Plain", 64, 28 * KB, (5, 3, 7), 630),
    Budget(r"lrn_fwd_planes<\w+, LrnOfFive, Plain", 56, 28 * KB, (5, 3, 7), 600),
    Budget(r"lrn_fwd_planes<\w+, LrnOfFive,", 64, 28 * KB, (5, 3, 7), 980),
    Budget("lrn_fwd_planes<", 64, 34 * KB, (4, 2, 6), 1260),
    # Backward four pixels a thread, with all of a step's in registers: eight blocks of 64 threads, of which shared
    # memory leaves fewer. With a mask there are sums for the bias; other windows have a pixel a thread.
    Budget("lrn_bwd_planes<float, false,", 128, 41 * KB, (3, 2, 5), 2250),
    Budget(r"lrn_bwd_planes<\w+, false,", 128, 31 * KB, (5, 3, 7), 2010),
    Budget("lrn_bwd_planes<float, true,", 128, 41 * KB, (3, 2, 5), 2550),
    Budget(r"lrn_bwd_planes<\w+, true,", 128, 31 * KB, (5, 3, 7), 2270),
    Budget("lrn_bwd_planes_any<", 112, 40 * KB, (3, 2, 4), 3650),
    # The same walk behind the pool, two blocks of seven warps.
    Budget("lrn_pool_bwd_planes<", 128, 79 * KB, (2, 1, 2), 3300),
    # x, dy and the pool's gather; q of a block's threads in shared memory, twice, and sums for the bias.
    Budget(r"lrn_bwd_nhwc<\w+, \d, 2, LrnOfFive,", 64, 24 * KB, (4, 4, 4), 470),
    Budget(r"lrn_bwd_nhwc<\w+, \d, 2,", 72, 24 * KB, (3, 3, 3), 1290),
    Budget("lrn_bwd_nhwc<", 96, 24 * KB, (2, 2, 2), 1520),
    # The walk backward, with three rings of channels; a second block where summing for the bias or wide windows take
    # more than 128 registers would be had by spilling some.
    Budget(r"lrn_bwd_nchw<\w+, \d, 2, false,", 128, 2 * KB, (2, 2, 2), 1800),
    Budget("lrn_bwd_nchw<", 144, 2 * KB, (1, 1, 1), 6150),
    # 40 KB of LRN's output a block, which is what bounds it but in NCHW.
    Budget(r"lrn_pool_fwd<\w+, \d, \d, true>", 80, 40 * KB, (3, 2, 3), 1390),
    Budget("lrn_pool_fwd<", 112, 40 * KB, (2, 2, 2), 3480),
    # AlexNet's stages in 16 bits: a pixel's LRN once a block, in pairs from there on. The first version had 1,136
    # instructions, of which it issued 55 an element; backward 1,168, and 94.
    Budget("lrn_pool_fwd_packed<", 64, 40 * KB, (3, 2, 4), 780),
    # In inference a thread goes down a column, with two rows on their way, in planes as single elements.
    Budget("lrn_pool_fwd_columns<float,", 80, 23 * KB, (2, 2, 2), 770),
    Budget(r"lrn_pool_fwd_columns<\w+, 8, 0>", 56, 12 * KB, (3, 3, 3), 530),
    Budget("lrn_pool_fwd_columns<", 80, 12 * KB, (2, 2, 2), 580),
    # In planes vectors of their channels take the planes' place: a few warps of a block pool, and all walk.
    Budget(r"lrn_pool_fwd_planes<\w+, false>", 64, 56 * KB, (2, 1, 4), 1060),
    Budget("lrn_pool_fwd_planes<", 64, 56 * KB, (2, 1, 4), 1400),
    Budget("lrn_pool_bwd_packed<", 128, 7 * KB, (5, 5, 6), 1240),
    # Copies and sums of little data. The fold of whole lines in pairs is AlexNet's first layer: 1,080 instructions at
    # first, when they and not bytes bound it.
    Budget(r"conv_fold_image<\w+, 2, false>", 32, 0, (8, 6, 8), 480),
    Budget("conv_fold_image<", 40, 0, (6, 6, 6), 760),
    Budget("(conv_fold_kernel|conv_transpose|conv_sum)", 40, 5 * KB, (6, 6, 6)),
    # In NCHW a thread has up to eight lines of each image in shared memory, and sums of their pixels. For 64 channels
    # blocks have 128 threads, so half of this: five a multiprocessor of sm_90, three of sm_80, two of others.
    Budget("lpips_fwd_planes<", 72, 82 * KB, (1, 1, 2), 930),
    Budget(r"lpips_bwd_planes<\w+, false>", 96, 84 * KB, (1, 1, 2), 1270),
    Budget("lpips_bwd_planes<", 96, 84 * KB, (1, 1, 2), 1440),
    # A block shares three numbers of 64 pixels for both images, single elements of NCHW two for each thread as well.
    Budget("lpips_fwd<", 64, 6 * KB, (4, 4, 4), 910),
    Budget("lpips_bwd<", 80, 7 * KB, (3, 3, 3), 1480),
    Budget("lpips_weight<", 64, 9 * KB, (4, 4, 4), 1500),
    Budget("lpips_average<", 48, 0, (6, 6, 5), 400),
    # Four blocks, so that fc6's and fc7's 512 are there at once: what a lane may have are 128 registers. Of two outputs
    # it has up to four loads in flight, with the sums and addresses of one row; two, or one of float32 and int8, with
    # those of eight and four. The loops are in two copies, for the first rows and for more.
    Budget(r"linear<[\w ]+, [\w ]+, \d+, [148]>", 128, 0, (4, 4, 4)),
    Budget("add_rows<", 32, 4 * KB, (2, 1, 2), 190),
    # The larger tiles: two blocks on cards with the shared memory for it. 128 x 192 has 256 threads, and one block.
    Budget(r"conv_relu_fwd<ConvTile<TensorCores<\w+>, 128, 128,", 224, 99 * KB, (2, 1, 2)),
    Budget(r"conv_relu_fwd<ConvTile<TensorCores<\w+>, 128, 192,", 168, 99 * KB, (1, 1, 1)),
    Budget(r"conv_relu_fwd<ConvTile<TensorCores<\w+>, 128, 64,", 128, 99 * KB, (3, 1, 4)),
    Budget(r"conv_relu_fwd<ConvTile<TensorCores<\w+>, 64, 64,", 80, 99 * KB, (4, 2, 6)),
    Budget("conv_relu_fwd<ConvTile<MultiplyAdd, 128, 64,", 255, 99 * KB, (2, 1, 2)),
    Budget(r"conv_weight_gradient<WeightTile<TensorCores<\w+>, 128, 128,", 224, 99 * KB, (2, 1, 2)),
    Budget(r"conv_weight_gradient<WeightTile<TensorCores<\w+>, 64, 128,", 128, 99 * KB, (3, 1, 4)),
    Budget("conv_weight_gradient<WeightTile<MultiplyAdd, 64, 128,", 168, 99 * KB, (3, 1, 3)),
    # One block has all of a multiprocessor of sm_90a: 168 registers a thread at its start, handed out anew inside.
    Budget("sm90::(conv_relu_fwd|conv_masked_gradient|conv_weight_gradient)<", 168, 227 * KB, (0, 0, 1)),
    Budget(r"sm90::conv_split_fwd<sm90::WgmmaTile<\w+, 4, 2,", 168, 227 * KB, (0, 0, 1)),
    # Two, so that the next layer's begins beside this one's; and what adds up fits beside both.
    Budget("sm90::conv_split_fwd<", 72, 98 * KB, (0, 0, 2)),
    Budget("sm90::conv_add_splits<", 40, 0, (0, 0, 8)),
    # The weights take 108 of the consumers' registers. What follows a row's products is short: with another warpgroup's
    # products under way it has 756 cycles.
    Budget("sm90::conv_first_fwd<", 168, 227 * KB, (0, 0, 1), 1400),
    # With a third consumer 128. Of the instructions pooling takes 91 for eight channels of an output, in training 185,
    # and 190 come before the wait for the kernel before: a place, and weights into L2.
    Budget(r"sm90::conv_stage_fwd<sm90::WgmmaTile<\w+, 4, 1, 128, 4, 3>", 128, 227 * KB, (0, 0, 1), 2100),
    Budget("sm90::conv_stage_fwd<sm90::WgmmaTile<float,", 168, 227 * KB, (0, 0, 1), 2450),
    Budget("sm90::conv_stage_fwd<", 168, 227 * KB, (0, 0, 1), 2200),
    # The slabs and the ring of the convolution's output: one block on all but sm_90.
    Budget("conv_stage_fwd<", 152, 99 * KB, (1, 1, 2)),
]


def budget(kernel: Kernel) -> Budget | None:
    return next((row for row in BUDGETS if re.match(row.kernels, kernel.name)), None)


# ---- Bytes or instructions -------------------------------------------------------------------------------------------

# 132 multiprocessors issue four instructions of 32 threads a cycle, 1.7 GHz: 9.6 for each byte that an H100 copies in
# the meantime, 6.7 for an H200's. The 108 of an A100 at 1.4 GHz and 2.0 TB/s issue 9.7.
SLOTS = 132 * 4 * 32 * 1.7e9
COPIES = {"H100": 3.0e12, "H200": 4.3e12}  # bytes a second, both ways together


def slots(bytes_moved: float, card: str) -> float:
    """How many instructions of one thread the card issues in the time of so many bytes."""
    return bytes_moved * SLOTS / COPIES[card]


@dataclass(frozen=True)
class Work:
    """What AlexNet's layers ask of a kernel, for each element of the larger of its tensors. ``issued`` are counted on
    the way that sm_90's code takes for them, as the kernels' files say, in planes of 55 x 55: places and copies too."""

    kernels: str
    bytes: float
    issued: int
    loop: int  # instructions of the loop that does most of it, with all branches, at most on sm_80 and sm_90
    over: tuple[str, ...] = ()  # cards on which more are issued than bytes leave time for: instructions bind there


HALF = "(bf16|f16)"
WORK = [
    Work(f"relu_nhwc<{HALF}, 8", 4, 3, 50),
    Work("relu_nhwc<float, 4", 8, 8, 60),
    Work(f"relu_nchw<{HALF}, 8", 4, 13, 484),
    Work("relu_nchw<float, 4", 8, 25, 464),
    Work(f"relu_bwd_nhwc<{HALF}, 8", 6, 8, 132),
    Work("relu_bwd_nhwc<float, 4", 12, 8, 65),
    Work(f"relu_bwd_nchw<{HALF}, 8", 6, 17, 312),
    Work("relu_bwd_nchw<float, 4", 12, 29, 424),
    Work(f"lrn_fwd_nhwc<{HALF}, 8, 2, LrnOfFive, Plain", 4, 13, 106),
    Work(f"lrn_fwd_nhwc<{HALF}, 8, 2, LrnOfFive, Rect", 4, 15, 120),
    Work("lrn_fwd_nhwc<float, 4, 2, LrnOfFive", 8, 26, 106),
    Work(f"lrn_bwd_nhwc<{HALF}, 8, 2, LrnOfFive, false", 6, 28, 230),
    Work(f"lrn_bwd_nhwc<{HALF}, 8, 2, LrnOfFive, true", 6, 32, 262),
    Work("lrn_bwd_nhwc<float, 4, 2, LrnOfFive", 12, 50, 201),
    # Of AlexNet's first 96 channels in one group.
    Work(f"lrn_fwd_planes<{HALF}, LrnOfFive, Plain", 4, 21, 112),
    Work("lrn_fwd_planes<float, LrnOfFive, Plain", 8, 32, 152),
    Work(f"lrn_fwd_planes<{HALF}, LrnOfFive, Rect", 4, 24, 112),
    Work("lrn_fwd_planes<float, LrnOfFive, Rect", 8, 39, 152),
    Work(f"lrn_bwd_planes<{HALF}, false, Odd", 6, 34, 670),
    Work("lrn_bwd_planes<float, false, Odd", 12, 49, 855),
    Work(f"lrn_bwd_planes<{HALF}, true, Odd", 6, 39, 820),
    Work("lrn_bwd_planes<float, true, Odd", 12, 54, 1005),
    # Windows of 3 with stride 2: of 16 bits 2.5 bytes an input forward, and a quarter of one more for the code.
    Work(rf"pool_fwd_packed<{HALF}, 8, 2, false", 2.5, 8, 137),
    Work(rf"pool_fwd_packed<{HALF}, 8, 2, true", 2.75, 10, 217),
    Work("pool_fwd_strips<float, 4, 3, 2, 2", 5.25, 25, 680),
    Work(rf"pool_fwd_planes<{HALF}, 3, 2, false", 2.5, 12, 47),
    Work(rf"pool_fwd_planes<{HALF}, 3, 2, true", 2.75, 17, 71),
    Work("pool_fwd_planes<float, 3, 2, false, false", 5.25, 20, 33),
    Work("pool_fwd_planes<float, 3, 2, false, true", 5.25, 20, 33),
    Work("pool_fwd_planes<float, 3, 2, true, false", 5.25, 25, 42),
    Work("pool_fwd_planes<float, 3, 2, true, true", 5.25, 29, 53),
    Work(f"pool_bwd_patches<{HALF}, 8, false", 2.75, 11, 370),
    Work(f"pool_bwd_patches<{HALF}, 8, true", 2.75, 12, 400),
    Work("pool_bwd_patches<float, 4, false", 5.25, 14, 250),
    Work("pool_bwd_patches<float, 4, true", 5.25, 16, 270),
    Work(f"pool_bwd_planes<{HALF}, false", 2.75, 16, 45),
    Work("pool_bwd_planes<float, false", 5.25, 17, 45),
    Work(f"pool_bwd_planes<{HALF}, true", 2.75, 17, 52),
    Work("pool_bwd_planes<float, true", 5.25, 18, 52),
    # With LRN in between, in training r and the codes as well.
    # Special functions are 2.2 and 2.04 in inference: 2.5 bytes leave 3.0 on an H100, and 2.1 on an H200.
    Work(f"lrn_pool_fwd_columns<{HALF}, 8, 0", 2.5, 16, 223),
    Work(f"lrn_pool_fwd_packed<{HALF}, 8", 4.75, 31, 144),
    Work(f"lrn_pool_bwd_packed<{HALF}, 8", 4.75, 31, 1030),
    Work("lrn_pool_fwd_columns<float, 8, 0", 5, 23, 374),
    Work("lrn_pool_fwd_columns<float, 4, 0", 5, 26, 206),
    Work("lrn_pool_fwd_packed<float, 4", 9.25, 60, 132),
    Work("lrn_pool_bwd_packed<float, 4", 9.25, 46, 770),
    Work(rf"lrn_pool_fwd_columns<{HALF}, 8, \d\d", 2.5, 16, 266),
    Work(r"lrn_pool_fwd_columns<float, 8, \d\d", 5, 23, 386),
    Work(f"lrn_pool_fwd_planes<{HALF}, true", 4.75, 30, 200),
    Work("lrn_pool_fwd_planes<float, true", 9.25, 52, 300),
    # The arithmetic alone, one by one in epilogue_bwd.cu, is 33, of the H200's 31.7.
    Work(f"lrn_pool_bwd_planes<{HALF}, AlexNet", 4.75, 45, 1015, ("H200",)),
    Work("lrn_pool_bwd_planes<float, AlexNet", 9.25, 59, 1215),
    # x of both images.
    Work(f"lpips_fwd<{HALF}, 8, true", 2, 13, 117),
    Work("lpips_fwd<float, 4, true", 4, 17, 72),
    Work(f"lpips_fwd_planes<{HALF}", 2, 12, 58),
    Work("lpips_fwd_planes<float", 4, 14, 26),
    Work(f"lpips_bwd<{HALF}, 8, true", 4, 26, 172),
    Work("lpips_bwd<float, 4, true", 8, 34, 114),
    Work(f"lpips_bwd_planes<{HALF}, false", 4, 22, 110),
    Work("lpips_bwd_planes<float, false", 8, 28, 54),
    Work(f"lpips_bwd_planes<{HALF}, true", 4, 25, 137),
    Work("lpips_bwd_planes<float, true", 8, 33, 66),
    # A weight, by one row, up to four and up to eight. The units that turn int8 into floats do 3.6 TB/s: on an H200
    # they bind.
    Work(f"linear<{HALF}, {HALF}, 8, 1", 2, 3, 181),
    Work("linear<float, float, 4, 1", 4, 2, 53),
    Work(f"linear<{HALF}, {HALF}, 8, 4", 2, 8, 255),
    Work("linear<float, float, 4, 4", 4, 6, 98),
    Work(f"linear<{HALF}, {HALF}, 8, 8", 2, 15, 468, ("H200",)),
    Work("linear<float, float, 4, 8", 4, 14, 112),
    Work(f"linear<{HALF}, signed char, 16, 1", 1, 4, 248),
    Work("linear<float, signed char, 16, 1", 1, 4, 219),
    Work(f"linear<{HALF}, signed char, 16, 4", 1, 9, 290, ("H200",)),
    Work("linear<float, signed char, 16, 4", 1, 8, 234, ("H200",)),
]


# Kernels for other windows, for what makes no vectors, and for little data.
GENERAL = (
    r"pool_(fwd|bwd)_(any|strips)<|lrn_(fwd|bwd)_nchw<|lrn_fwd_planes<\w+, Lrn,|lrn_bwd_planes_any<"
    r"|lrn_bwd_planes<\w+, \w+, AnyApart|lrn_pool_bwd_planes<\w+, RowsApart"
    r"|lrn_(fwd|bwd)_nhwc<\w+, \d, \d, Lrn,|lrn_pool_fwd<|lrn_pool_fwd_planes<\w+, false"
    r"|\w+<\w+, 1[,>]|lpips_(weight|average)<|add_rows<"
    r"|conv_|linear<[\w ]+, [\w ]+, 1,|sm90::"
)


def work_faults(built: list[Kernel]) -> list[str]:
    """Kernels without a row, rows whose kernel is gone or whose loop has grown, and those that say of what binds it
    what the arithmetic does not give."""
    known = re.compile("|".join([GENERAL, *(row.kernels for row in WORK)]))
    found = [f"{kernel.name}: nobody has counted its work" for kernel in built if not known.match(kernel.name)]
    for row in WORK:
        over = tuple(card for card in COPIES if row.issued > slots(row.bytes, card))
        if over != row.over:
            found.append(f"{row.kernels}: instructions bind on {over}, and the row says {row.over}")
        some = [k for k in built if k.architecture in (80, 90) and re.match(row.kernels, k.name)]
        found += [] if some else [f"{row.kernels}: no such kernel"]
        # A loop that shrinks by more has its row counted anew.
        found += [
            f"{k.name}, sm_{k.architecture}: no loop of {row.loop} instructions or a little less"
            for k in some
            if not any(0.75 * row.loop <= length <= row.loop for length in k.loops)
        ]
    return found


# ---- Instructions ----------------------------------------------------------------------------------------------------

PRODUCTS = {
    "TensorCores<f16>": "HMMA.16816.F32",
    "TensorCores<bf16>": "HMMA.16816.F32.BF16",
    "TensorCores<float>": "HMMA.1688.F32.TF32",
    "MultiplyAdd": "FFMA",
}


# What planes in shared memory are copied by.
BY_16_BYTES = [r"LDGSTS\.E\.BYPASS\.128", r"LDS\.128", r"STG\.E\.128"]


def wanted_instructions(kernel: Kernel) -> list[str]:
    """Regular expressions, each for the whole of an instruction that the kernel was written for."""
    if math := next((math for math in PRODUCTS if math in kernel.name), None):
        wanted = [re.escape(PRODUCTS[math]), r"LDGSTS\.E\.BYPASS\.128"]  # into shared memory, past L1
        words = math == "TensorCores<float>" and kernel.family == "conv_weight_gradient"  # ldmatrix turns 16 bits alone
        wanted += [] if math == "MultiplyAdd" or words else [r"LDSM\..*"]
        return wanted + ([] if kernel.family == "conv_weight_gradient" else [r"STG\.E\.128"])
    early = [r"ACQBULK", r"PREEXIT"]  # which wait for the kernel before, and let go the one behind
    if kernel.family == "sm90::conv_add_splits":
        return [*early, r"LDG\.E\.128", rf"STG\.E\.{128 if 'float' in kernel.name else 64}"]
    if kernel.hopper:  # products of operands in shared memory, which bulk copies bring, and registers handed out anew
        columns = 192 if kernel.family == "sm90::conv_weight_gradient" else kernel.arguments[-3]
        tf32 = "float" in kernel.name  # whose pairs are stored without stmatrix, without conflicts of banks
        kind = r"8\.F32\.TF32" if tf32 else r"16\.F32\.BF16" if "bf16" in kernel.name else r"16\.F32"
        product = rf"HGMMA\.64x{columns}x{kind}"
        to_shared, maximum = (r"STS\.64", r"FSETP\..*") if tf32 else (r"STSM\..*", r"VIMNMX3\.S16x2\.RELU")
        results = {
            "sm90::conv_relu_fwd": [to_shared, r"UTMASTG\.3D"],
            "sm90::conv_masked_gradient": [to_shared, r"UTMASTG\.3D", r"LDG\.E\.128", r"LDS\.128", r"STS\.128"],
            "sm90::conv_split_fwd": [r"STG\.E\.64"],
            "sm90::conv_stage_fwd": [to_shared, r"LDS\.128", maximum, r"STG\.E\.128"],
            "sm90::conv_weight_gradient": [],
            "sm90::conv_first_fwd": [r"LDSM\..*", r"STG\.E"],
        }[kernel.family]
        if kernel.arguments[-2:] == ["true", "false"]:  # pools, and has no codes
            results += [r"VIMNMX3\.S16x2\.RELU"]
        if kernel.arguments[-2:] == ["true", "true"]:
            results += [r"VIMNMX3\.U32", r"STG\.E\.U16"]
        results += [] if kernel.family == "sm90::conv_weight_gradient" else [r"UTMAPF\.L2\.4D"]
        results += [] if kernel.registers <= 72 else [r"USETMAXREG.*"]
        first = kernel.family == "sm90::conv_first_fwd"
        copies = [r"UTMALDG\.5D" if first else r"UTMALDG\.4D\.IM2COL", r"UTMALDG\.4D"]
        return [product, *copies, *results, *early, r"SYNCS\.PHASECHK.*"]
    if kernel.family == "conv_fold_image":
        return [r"STG\.E\.128"]
    if kernel.family == "linear":
        return (early if kernel.architecture >= 90 else []) + (
            [r"LDG\.E\.128(\.CONSTANT)?"] if kernel.arguments[-2] != "1" else []
        )
    if kernel.family in ("lpips_fwd", "lpips_weight"):  # which write a number a pixel, or a channel
        return [rf"LDG?\.E\.{8 * kernel.vector}(\.CONSTANT)?"] if kernel.vector == 16 else []
    if kernel.family == "lpips_fwd_planes":
        return BY_16_BYTES[:2]
    if kernel.family in ("pool_bwd_planes", "lpips_bwd_planes"):
        return BY_16_BYTES
    if kernel.family in ("lrn_bwd_planes", "lrn_pool_bwd_planes"):  # whose results of 16 bits lie between vectors
        return [BY_16_BYTES[0], r"LDS\.128" if kernel.arguments[0] == "float" else r"LDS\.64", BY_16_BYTES[2]]
    if kernel.family in ("lrn_fwd_planes", "lrn_bwd_planes_any"):
        return BY_16_BYTES + ([r"STS\.128"] if "Rectified" in kernel.name else [])
    if kernel.family == "lrn_pool_fwd_planes":  # in inference what leaves are outputs alone, a quarter of the elements
        return [*BY_16_BYTES[: 3 if "true" in kernel.name else 1], r"STS\.128"]
    compared = []
    of_two, of_three = r"HMNMX2(\.BF16_V2)?\.NAN", r"VIMNMX3\.S16x2\.RELU"  # sm_90 has these, where there is no sign
    if kernel.family == "pool_fwd_planes":
        # Of three on sm_90, without a ReLU too.
        return BY_16_BYTES if kernel.arguments[0] == "float" else [*BY_16_BYTES, r"V?HMNMX2?(\.BF16_V2)?\.NAN"]
    if kernel.family == "pool_fwd_packed":
        compared = [of_two, of_three] if "Rectified" in kernel.name and kernel.architecture == 90 else [of_two]
    if kernel.family in ("lrn_pool_fwd_packed", "lrn_pool_fwd_columns"):
        half = of_three if kernel.architecture == 90 else of_two
        compared = [r"V?IMNMX3?(\.U32)?" if kernel.arguments[0] == "float" else half, r"STS\.128"]
    if kernel.family == "lrn_pool_fwd_columns":
        vectors = kernel.arguments[2] == "0"
        return [*compared, r"LDS\.128", *([r"LDG\.E\.128\.CONSTANT", r"STG\.E\.128"] if vectors else [])]
    if kernel.family in ("pool_bwd_patches", "lrn_pool_bwd_packed"):  # two codes at once, subnormal ones: no .FTZ
        masks = kernel.family == "lrn_pool_bwd_packed" and kernel.arguments[0] != "float"
        compared = [r"HSETP2\.EQ\.AND", *([r"HSETP2\.LE\.AND"] if masks else [])]
    if kernel.vector in (8, 16):  # LD: where the compiler has lost that a pointer is to global memory
        bits = 8 * kernel.vector
        return [*compared, rf"LDG?\.E\.{bits}(\.CONSTANT)?", rf"STG\.E\.{bits}"]
    return []


def unwanted_instructions(kernel: Kernel) -> str:
    """A regular expression: local memory, atomics (sums have an order), and vectors stored word by word."""
    words = r"|STG\.E" if kernel.family.startswith("lrn_fwd") and kernel.vector == 16 else ""
    words += r"|STS" if kernel.family in ("lrn_pool_fwd_packed", "lrn_pool_fwd_columns") else ""
    return r"LDL.*|STL.*|RED\..*|ATOM.*" + words


def faults(kernel: Kernel) -> list[str]:
    """What is wrong with the kernel's machine code, each in a line."""
    found = []
    allowed = budget(kernel)
    if allowed is None:
        return [f"{kernel}: has no budget"]
    if kernel.stack:
        found.append(f"{kernel.stack} bytes of a thread are in local memory")
    if kernel.registers > allowed.registers:
        found.append(f"{kernel.registers} registers, budget {allowed.registers}")
    issued = sum(kernel.instructions.values())
    if allowed.instructions is not None and issued > allowed.instructions:
        found.append(f"{issued} instructions, budget {allowed.instructions}")
    shared = kernel.shared + kernel.dynamic(mask=kernel.family != "conv_stage_fwd")
    limit = min(allowed.shared, MULTIPROCESSORS[kernel.architecture].block_shared)
    if shared > limit:
        found.append(f"{shared} bytes of shared memory, budget {limit}")
    fewest = allowed.blocks[ARCHITECTURES.index(kernel.architecture)]
    if kernel.blocks < fewest:
        found.append(f"{kernel.blocks} blocks fit a multiprocessor, budget {fewest}")
    if kernel.hopper:  # several products between two waits: ptxas would give each its own where it serializes them
        products, waits = (
            sum(kernel.instructions[i] for i in kernel.instructions if i.startswith(start))
            for start in ("HGMMA", "WARPGROUP.ARRIVE")
        )
        if products < 3 * waits:
            found.append(f"{products} products in {waits} batches: they are serialized")
    for wanted in wanted_instructions(kernel):
        if not any(re.fullmatch(wanted, instruction) for instruction in kernel.instructions):
            found.append(f"no instruction {wanted}")
    unwanted = [name for name in kernel.instructions if re.fullmatch(unwanted_instructions(kernel), name)]
    found += [f"{kernel.instructions[name]} times {name}" for name in unwanted]
    return [f"{kernel.name}, sm_{kernel.architecture}: {fault}" for fault in found]
