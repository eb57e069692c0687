"""Which way of computing a convolution, or a linear layer of few rows, ``auto`` takes on a GPU: the fastest for the
shape, by measurement.

A candidate computes an operator from its arguments. By operator, the first is the library's, right everywhere:

- ``conv_relu``: ``cudnn_epilogue``, cuDNN's convolution, then this package's epilogue; ``cudnn_bias_relu``, cuDNN's
  convolution, bias and ReLU in one; ``cuda`` and ``triton``, this package's kernels; ``cuda_sm90``, its kernels for
  compute capability 9.0
- ``conv_stage``: ``cudnn_epilogue``, ``cuda``, ``cuda_sm90``, ``triton``; ``cuda_epilogue`` and ``cuda_sm90_epilogue``,
  this package's conv_relu, then its epilogue
- ``conv_backward_input``, ``conv_backward_weight``: ``cudnn``, ``cuda``, ``cuda_sm90``, ``triton``
- ``linear_relu``, of up to 8 rows: ``cublas``, torch's product, then its ReLU; ``cuda``

``cuda`` and ``cuda_epilogue`` estimate which tile of the output each block had best compute; a name of ``TILES`` behind
a colon, as in ``cuda:128x64``, chooses the tile. No GPU has run ``cuda_sm90`` yet, nor ``linear_relu``'s ``cuda``, so
the table has no row of them.

Which one is taken? The first of these that there is:

1. what a training run has pinned (:func:`pinned`);
2. with ``torch.backends.cudnn.benchmark = True``, the switch by which cuDNN measures its own algorithms: what was
   measured on this card, in this process or in a file of the cache folder, and if nothing was, the candidates are timed
   on the call's own tensors, once. Not while a CUDA graph is captured. ``triton``, whose kernels compile for seconds,
   takes part in ``alexnet-fast tune`` alone;
3. the table that ships with this package, choices.json (by ``python -m benchmarks.choices``, from measured rows): the
   nearest row answers, see :func:`shipped`.

A candidate is measured only if its result agrees with the library's within ``TOLERANCES``. One that does not is named
in a warning, and is not taken for any shape on that device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from math import log2, prod
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alexnet_fast import _C

TABLE = Path(__file__).with_name("choices.json")
LIBRARY = {
    "conv_relu": "cudnn_epilogue",
    "conv_stage": "cudnn_epilogue",
    "conv_backward_input": "cudnn",
    "conv_backward_weight": "cudnn",
    "linear_relu": "cublas",
}
# How far a result may be from the library's, as a share of its largest value: 8 times the rounding of the dtype, or of
# TF32. In float32 both sides round sums of up to 400 thousand products in their own order.
TOLERANCES = {torch.float32: 2**-13, torch.float16: 2**-7, torch.bfloat16: 2**-5}
TF32_TOLERANCE = 2**-7
# Rows x columns of the tiles of csrc/cuda's tables, in their order: of 16-bit elements, and of float32 by TF32. Tables
# of one tile leave nothing to choose.
_FORWARD = {16: ("128x128", "128x192", "128x64", "64x64"), 32: ("128x128", "64x64")}
TILES: dict[str, dict[str, dict[int, tuple[str, ...]]]] = {
    "conv_relu": {"cuda": _FORWARD},
    "conv_stage": {"cuda": {16: ("128x64", "64x128")}, "cuda_epilogue": _FORWARD},
    "conv_backward_input": {"cuda": _FORWARD},
    "conv_backward_weight": {"cuda": {16: ("128x128", "64x128")}},
}
CODES = 1 / 8  # share of a pooling's winners that may differ: of two values that round to the same, either may win
ROUNDS = 9
REACH = 4  # a row speaks for this package's kernels up to so many times larger or smaller sizes
AHEAD = 2_000_000  # cycles that the card waits before a timed call, about a millisecond: the host is done by then
INT32_MAX = 2**31 - 1
MOST_FORMS = 4096

Call = Callable[..., Any]


class Form(NamedTuple):
    """All that a choice depends on."""

    operator: str
    dtype: torch.dtype
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    layout: str  # of the result: channels_last or contiguous
    lrn: int = 0  # conv_stage: its size, 0 for none
    pool: tuple[int, ...] = (0, 0)  # conv_stage: its kernel, 0 for none
    training: bool = False  # conv_stage: whether it writes what backward needs
    tf32: bool = False
    deterministic: bool = False  # as torch.backends.cudnn.deterministic

    def __str__(self) -> str:
        """As in files of the cache folder and in a run's config."""
        dtype = str(self.dtype).removeprefix("torch.")
        words = [self.operator, dtype, f"{_by(self.x)} * {_by(self.weight)}", f"stride {_by(self.stride)}"]
        words += [f"padding {_by(self.padding)}", f"dilation {_by(self.dilation)}", f"groups {self.groups}"]
        words += [self.layout, *([f"lrn {self.lrn}"] if self.lrn else [])]
        words += [f"pool {_by(self.pool)}"] if self.pool[0] else []
        flags = {"training": self.training, "TF32": self.tf32, "deterministic": self.deterministic}
        return ", ".join([*words, *[name for name, holds in flags.items() if holds]])


def _by(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))


class Record(NamedTuple):
    """One choice: ``us`` has the candidates' medians in microseconds, ``refused`` why others were not measured."""

    candidate: str
    why: str
    us: dict[str, float]
    refused: dict[str, str]


# ---- The shipped table -----------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What of a form counts in finding the nearest row."""

    operator: str
    bits: int  # of an element: both 16-bit types use the matrix units alike
    grouped: bool
    windows: tuple[bool, bool]  # LRN, pooling
    sizes: tuple[float, ...]  # log2 of images; of output pixels, channels and filters a group, kernel and stride areas


class Row(NamedTuple):
    """A measured shape: the fastest candidate, and the fastest of the library's."""

    device: str
    work: Work
    candidate: str
    library: str


def work(
    operator: str,
    dtype: str,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    lrn: int,
    pool: int,
) -> Work:
    sides = zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
    pixels = prod((side + 2 * p - d * (kernel - 1) - 1) // s + 1 for side, kernel, s, p, d in sides)
    sizes = (x[0], pixels, weight[1], weight[0] / groups, prod(weight[2:]), prod(stride))
    bits = 8 * getattr(torch, dtype).itemsize
    return Work(operator, bits, groups > 1, (lrn > 0, pool > 0), tuple(map(log2, sizes)))


def work_of_row(row: Mapping[str, Any]) -> Work:
    """Of a row of choices.json, or of a results file with the same columns."""
    kernel, stride, padding = ((row[name],) * 2 for name in ("kernel", "stride", "padding"))
    x = row["batch"], row["channels"], row["height"], row["width"]
    weight = row["filters"], row["channels"] // row["groups"], *kernel
    windows = row["lrn"], row["pool"]
    return work(row["operator"], row["dtype"], x, weight, stride, padding, (1, 1), row["groups"], *windows)


def distance(a: Work, b: Work) -> float:
    """In doublings, over all sizes; LRN or pooling on one side alone counts as one."""
    windows = sum(one != other for one, other in zip(a.windows, b.windows, strict=True))
    return windows + sum(abs(one - other) for one, other in zip(a.sizes, b.sizes, strict=True))


def comparable(a: Work, b: Work) -> bool:
    return a[:3] == b[:3]


def near(measured: Work, asked: Work) -> bool:
    """Whether this package's kernels may be expected to do as well for ``asked``: no size is more than ``REACH`` times
    larger or smaller. More images are more of the same; with fewer, blocks leave a part of the card idle."""
    images = measured.sizes[0] - asked.sizes[0]
    others = [abs(a - b) for a, b in zip(measured.sizes[1:], asked.sizes[1:], strict=True)]
    return max(images, *others) <= log2(REACH)


@cache
def table() -> tuple[Row, ...]:
    return tuple(Row(row["device"], work_of_row(row), row["candidate"], row["library"]) for row in _rows())


def _rows() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text())["rows"]


@cache
def folded_table() -> tuple[Row, ...]:
    """The table's first layers that are this package's, as of images that come folded (ops.augment): the same kernels
    compute those, less a copy of the images that was measured with them."""
    found = []
    for row in _rows():
        step, taps = row["stride"], -(-row["kernel"] // row["stride"])
        if row["channels"] == 3 and step > 1 and not row["candidate"].startswith("cudnn"):
            sides = [(row[side] + 2 * row["padding"] - row["kernel"]) // step + taps for side in ("height", "width")]
            options = {"channels": 3 * step * step, "kernel": taps, "stride": 1, "padding": 0}
            folded = row | options | dict(zip(("height", "width"), sides, strict=True))
            found.append(Row(row["device"], work_of_row(folded), row["candidate"], row["library"]))
    return tuple(found)


def shipped(form: Form, device: str = "") -> str:
    """The table's candidate for ``form`` on the GPU called ``device``.

    The nearest row of the same operator, element size and kind (with groups or without) answers: of rows measured on
    this device if there are any, else of all. If it is not :func:`near`, it answers for the library alone; if there is
    none, the answer is the library's convolution and then the epilogue. For images that come folded, which have the
    channels, kernel and stride of a row of :func:`folded_table` that is near, the nearest of those answers.
    """
    lrn, (pool, *_) = form.lrn, form.pool
    geometry = form.stride, form.padding, form.dilation, form.groups
    asked = work(form.operator, str(form.dtype).removeprefix("torch."), form.x, form.weight, *geometry, lrn, pool)
    rows = [row for row in folded_table() if comparable(row.work, asked) and near(row.work, asked)]
    rows = [row for row in rows if (row.work.sizes[2], *row.work.sizes[4:]) == (asked.sizes[2], *asked.sizes[4:])]
    rows = rows or [row for row in table() if comparable(row.work, asked)]
    rows = [row for row in rows if row.device == device] or rows
    if not rows:
        return LIBRARY[form.operator]
    nearest = min(rows, key=lambda row: distance(row.work, asked))
    return nearest.candidate if near(nearest.work, asked) else nearest.library


# ---- Choosing --------------------------------------------------------------------------------------------------------

_lock = threading.RLock()
_taken: dict[tuple, str] = {}  # by form, device and switch: what the next call takes
_used: dict[str, Record] = {}
_pins: dict[str, str] | None = None
_told: set[str] = set()
_watcher: Callable[[Form, Record], object] | None = None


def tiles(operator: str, candidate: str, dtype: torch.dtype, tf32: bool) -> tuple[str, ...]:
    """The tiles that a candidate, named without one, can be told to take."""
    if dtype == torch.float32 and not tf32:
        return ()
    return TILES[operator].get(candidate, {}).get(8 * dtype.itemsize, ())


def run(form: Form, candidates: Mapping[str, Call], arguments: tuple) -> Any:
    """The result of the candidate that is taken for ``form``."""
    return candidates[choose(form, candidates, arguments)](*arguments)


def choose(form: Form, candidates: Mapping[str, Call], arguments: tuple) -> str:
    """The name of the candidate that is taken for ``form``; ``arguments`` are the call's, its first one a tensor."""
    key = form, arguments[0].device, torch._C._get_cudnn_benchmark(), torch._C._get_cudnn_enabled()
    return _taken.get(key) or _settle(key, form, candidates, arguments)


def _settle(key: tuple, form: Form, candidates: Mapping[str, Call], arguments: tuple) -> str:
    library, device = LIBRARY[form.operator], arguments[0].device
    if 0 in form.x or 0 in form.weight:
        return library
    with _lock, torch.cuda.device_of(arguments[0]):
        able = {name: call for name, call in candidates.items() if _able(form, name, device)}
        capturing = _capturing(device)
        record = _pinned_or_measured(form, able, arguments, capturing) or _from_table(form, device)
        name = record.candidate
        lost = ""
        if name not in able:
            lost = "it cannot run here"
        elif _is_wrong(form.operator, name, device):
            lost = "its results were wrong"
        elif name == "cudnn_bias_relu":
            lost = "a graph is captured" if capturing else loses_nan(able[name], able[library], arguments)
        if lost:
            record = Record(library, f"{record.why}, but for {name}: {lost}", record.us, record.refused)
        if len(_used) >= MOST_FORMS:
            _taken.clear(), _used.clear()
        if not capturing:
            _taken[key] = record.candidate
        _used[str(form)] = record
        if _watcher:
            _watcher(form, record)
        return record.candidate


def _able(form: Form, name: str, device: torch.device) -> bool:
    """Whether a candidate can compute ``form`` here at all. cuDNN's fused bias and ReLU are left out with groups, where
    they take up to 17 times as long as the convolution alone; where determinism is wanted, for which torch does not
    ask; and where offsets pass 32 bits, as torch does not split the call."""
    kernel, _, tile = name.partition(":")
    if tile:
        return tile in tiles(form.operator, kernel, form.dtype, form.tf32)
    if name.startswith("cuda_sm90"):
        takes = form.dtype.itemsize == 2 or (form.tf32 and form.operator != "conv_backward_weight")
        return takes and capability(device) == (9, 0)
    if name != "cudnn_bias_relu":
        return True
    batch = form.x[0]
    return (
        form.groups == 1
        and not form.deterministic
        and torch.backends.cudnn.enabled
        and max(prod(form.x), batch * form.weight[0] * prod(form.x[2:])) <= INT32_MAX
    )


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned_or_measured(form: Form, candidates: Mapping[str, Call], arguments: tuple, capturing: bool) -> Record | None:
    if _pins is not None:
        name = _pins.get(str(form))
        return Record(name, "pinned", {}, {}) if name in candidates else None
    if not torch.backends.cudnn.benchmark:
        return None
    device = arguments[0].device
    record = measured(device).get(str(form))
    if record is None and not capturing:
        if not _watcher:
            candidates = {name: call for name, call in candidates.items() if name != "triton"}
        record = measure(form, candidates, arguments)
        if record:
            _keep(device, form, record)
    return record if record and record.candidate in candidates else None


def _is_wrong(operator: str, name: str, device: torch.device) -> bool:
    """Whether a measurement on this device, of any shape, has found the candidate's result to be wrong."""
    records = [record for form, record in measured(device).items() if form.startswith(f"{operator},")]
    return any(record.refused.get(name, NO_MEMORY) not in UNSUITED for record in records)


def _from_table(form: Form, device: torch.device) -> Record:
    return Record(shipped(form, device_name(device)), "table", {}, {})


@contextlib.contextmanager
def pinned(choices: dict[str, str]) -> Iterator[None]:
    """Within, forms in ``choices`` have the candidate it names, and others the table's; nothing is measured."""
    global _pins
    before, _pins = _pins, choices
    forget()
    try:
        yield
    finally:
        _pins = before
        forget()


@contextlib.contextmanager
def watched(watcher: Callable[[Form, Record], object]) -> Iterator[None]:
    """Within, ``watcher`` hears each choice as it is made, and Triton's kernels are measured too."""
    global _watcher
    before, _watcher = _watcher, watcher
    forget()
    try:
        yield
    finally:
        _watcher = before
        forget()


def used() -> dict[str, str]:
    """What this process has chosen so far, by form."""
    return {form: record.candidate for form, record in _used.items()}


def forget() -> None:
    """All choices of this process are made anew; files in the cache folder stay."""
    for kept in (_taken, _used, _files):
        kept.clear()


# ---- Measuring -------------------------------------------------------------------------------------------------------

# Why a candidate is not taken for a shape, though it is not wrong.
NO_MEMORY, MAKES_NUMBERS, NOT_COVERED = UNSUITED = (
    "memory does not suffice",
    "it makes numbers of NaN",
    "it does not cover the shape",
)


def clock(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds that ``call`` takes on ``device``."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def measure(form: Form, candidates: Mapping[str, Call], arguments: tuple) -> Record | None:
    """Times the candidates whose results agree with the library's, in rounds in which they alternate.

    None where the library's own result tells nothing, because it is zero all over or not finite, or where memory does
    not suffice.
    """
    device, library = arguments[0].device, LIBRARY[form.operator]
    tolerance = TF32_TOLERANCE if form.tf32 else TOLERANCES[form.dtype]
    try:
        wanted = candidates[library](*arguments)
        if not _tells(wanted):
            return None
        times: dict[str, list[float]] = {library: []}
        refused = {}
        for name, call in candidates.items():
            if name != library:
                reason = _differs(call, arguments, wanted, tolerance)
                if not reason and name == "cudnn_bias_relu":
                    reason = loses_nan(call, candidates[library], arguments)
                if reason:
                    refused[name] = reason
                else:
                    times[name] = []
        del wanted
        for _ in range(ROUNDS):
            for name, measurements in times.items():
                measurements.append(clock(lambda call=candidates[name]: call(*arguments), device))
    except torch.OutOfMemoryError:
        return None
    for name, reason in refused.items():
        if reason not in UNSUITED:
            _say(f"{form}: {name} is not taken: {reason}")
    us = {name: round(median(measurements), 2) for name, measurements in times.items()}
    return Record(min(us, key=us.__getitem__), "measured", us, refused)


def _results(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result for result in (results if isinstance(results, tuple) else (results,)) if result.numel()]


def _tells(results: Tensor | tuple[Tensor, ...]) -> bool:
    return all(bool(result.isfinite().all()) and bool(result.any()) for result in _results(results)[:1])


def _differs(call: Call, arguments: tuple, wanted: Tensor | tuple[Tensor, ...], tolerance: float) -> str:
    """How the call's result differs from ``wanted`` by more than rounding; '' if it does not."""
    try:
        got, wanted = _results(call(*arguments)), _results(wanted)
    except torch.OutOfMemoryError:
        return NO_MEMORY
    except RuntimeError as error:
        if "operation not supported" in str(error):  # as CUDA words what a launcher refuses
            return NOT_COVERED
        return " ".join(str(error).split())[:200]
    shapes = [[(result.shape, result.dtype) for result in results] for results in (got, wanted)]
    if shapes[0] != shapes[1]:
        return f"its results are {shapes[0]}, the library's {shapes[1]}"
    for one, other in zip(got, wanted, strict=True):
        if not other.is_floating_point():
            share = (one != other).float().mean().item()
            if share > CODES:
                return f"{share:.0%} of its pooling's winners are others than the library's"
            continue
        error = _largest_difference(one, other) / max(other.abs().max().item(), torch.finfo(other.dtype).tiny)
        if not error <= tolerance:
            return f"its result differs from the library's by {error:.2g} of the largest value, over {tolerance:.2g}"
    return ""


def _largest_difference(a: Tensor, b: Tensor) -> float:
    """In float32, a part at a time: a copy of it all may not fit beside the caller's tensors. NaN if one is NaN."""
    part = max(1, 2**24 * len(b) // b.numel())
    pieces = zip(a.split(part), b.split(part), strict=True)
    return torch.stack([(one.float() - other.float()).abs().max() for one, other in pieces]).max().item()


def loses_nan(call: Call, library: Call, arguments: tuple) -> str:
    """How ``call`` fails on images that are NaN all over, or turns NaN into numbers, as the ReLU in a library's
    convolution may: a training run that has diverged would then look healthy. '' where it does neither."""
    try:
        images = torch.full_like(arguments[0], torch.nan)
        alike = torch.equal(call(images, *arguments[1:]).isnan(), library(images, *arguments[1:]).isnan())
    except torch.OutOfMemoryError:
        return NO_MEMORY
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]
    return "" if alike else MAKES_NUMBERS


# ---- The cache folder ------------------------------------------------------------------------------------------------

_files: dict[Path, dict[str, Record]] = {}


@cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def _driver() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"\d+(\.\d+)+", Path("/proc/driver/nvidia/version").read_text())
        return found.group() if found else ""
    return ""


def about(device: torch.device) -> dict[str, str]:
    """What a measurement holds for: the device, its driver, cuDNN, and this package's kernels."""
    return {
        "device": device_name(device),
        "driver": _driver(),
        "cudnn": str(torch.backends.cudnn.version()),
        "kernels": _C.build_info()["sources"],
    }


def file_of(device: torch.device) -> Path:
    """Where this device's measurements are kept: below ALEXNET_FAST_CACHE, or else the user's cache folder."""
    root = os.environ.get("ALEXNET_FAST_CACHE")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "alexnet_fast")
    facts = about(device)
    words = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    return Path(root, f"{words}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}.json")


def measured(device: torch.device) -> dict[str, Record]:
    """What the cache folder holds for this device, by form. A file that is damaged or another device's is ignored, with
    a warning."""
    path = file_of(device)
    if path not in _files:
        _files[path] = _read(path, device)
    return _files[path]


def _read(path: Path, device: torch.device) -> dict[str, Record]:
    try:
        record = json.loads(path.read_bytes())
        if record["about"] != about(device):
            raise ValueError(f"measured on {record['about']}")
        return {
            str(form): Record(str(kept["candidate"]), "measured", dict(kept["us"]), dict(kept["refused"]))
            for form, kept in record["choices"].items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _say(f"{path} is ignored: {type(error).__name__}: {' '.join(str(error).split())}")
        return {}


def _keep(device: torch.device, form: Form, record: Record) -> None:
    """In the process and in the file, which other processes may have written to since."""
    path = file_of(device)
    _files[path] = {**measured(device), **_read(path, device), str(form): record}
    kept = {
        name: {"candidate": one.candidate, "us": one.us, "refused": one.refused} for name, one in _files[path].items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".unfinished", delete=False) as file:
            try:
                json.dump({"about": about(device), "choices": kept}, file, indent=1)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        _say(f"{path.parent}: measurements cannot be kept there: {error.strerror or error}")


def _say(text: str) -> None:
    """A warning, once."""
    if text not in _told:
        _told.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)
