"""csrc/params.h in ctypes. The runner refuses a struct of another size."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_double, c_int32, c_int64, c_void_p

import torch

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


class Window(Structure):
    _fields_ = [(name, c_int32) for name in ("kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w")]


class LrnWindow(Structure):
    _fields_ = [("size", c_int32), ("groups", c_int32), ("alpha", c_double), ("beta", c_double), ("k", c_double)]


class LrnParams(Structure):
    _fields_ = [
        ("dtype", c_int32),
        ("channels_last", c_bool),
        *((name, c_int64) for name in ("batch", "channels", "pixels")),
        ("lrn", LrnWindow),
        *((name, c_void_p) for name in ("x", "y", "dy", "dx")),
    ]


IMAGE = [(name, c_int64) for name in ("batch", "channels", "height", "width", "out_height", "out_width")]


class PoolParams(Structure):
    _fields_ = [
        ("dtype", c_int32),
        ("channels_last", c_bool),
        *IMAGE,
        ("window", Window),
        *((name, c_void_p) for name in ("x", "y", "code", "dy", "dx")),
    ]


class EpilogueParams(Structure):
    _fields_ = [
        ("dtype", c_int32),
        ("channels_last", c_bool),
        *IMAGE,
        ("lrn", LrnWindow),
        ("window", Window),
        *((name, c_void_p) for name in ("z", "bias", "y", "code", "r", "dy", "dz", "db_partial", "db")),
    ]


class LpipsParams(Structure):
    _fields_ = [
        ("dtype", c_int32),
        *((name, c_bool) for name in ("channels_last", "spatial")),
        *((name, c_int64) for name in ("pairs", "channels", "pixels")),
        *((name, c_void_p) for name in ("x", "weight", "y", "partial", "dy", "dx", "dweight")),
    ]


class LinearInt8Params(Structure):
    _fields_ = [
        ("dtype", c_int32),
        *((name, c_int64) for name in ("rows", "inputs", "outputs")),
        *((name, c_void_p) for name in ("x", "weight", "scales", "bias", "y")),
    ]


class LinearParams(Structure):
    _fields_ = [
        ("dtype", c_int32),
        ("relu", c_bool),
        *((name, c_int64) for name in ("rows", "inputs", "outputs")),
        *((name, c_void_p) for name in ("x", "weight", "bias", "y")),
    ]


class ConvParams(Structure):
    _fields_ = [
        ("dtype", c_int32),
        ("allow_tf32", c_bool),
        ("prepared", c_bool),
        ("mask_dx", c_bool),
        ("tile", c_int32),
        *((name, c_int64) for name in ("batch", "channels", "height", "width")),
        *((name, c_int64) for name in ("out_channels", "out_height", "out_width")),
        ("window", Window),
        *((name, c_int32) for name in ("dilation_h", "dilation_w", "groups")),
        *((name, c_void_p) for name in ("x", "weight", "bias", "y", "dy", "dx", "dweight", "dbias", "workspace")),
    ]


class StageParams(Structure):
    _anonymous_ = ("conv",)
    _fields_ = [
        ("conv", ConvParams),
        ("lrn", LrnWindow),
        ("pool", Window),
        *((name, c_int64) for name in ("pooled_height", "pooled_width")),
        *((name, c_void_p) for name in ("pooled", "code", "r")),
    ]
