"""Whole ways to train AlexNet, by name, for ``--recipe``. docs/training.md compares them.

Sources:

- paper: Krizhevsky, Sutskever, Hinton, 2012, sections 4 and 5
- alex2012: github.com/computerhistory/AlexNet-Source-Code, layer-params-145.cfg with the log at its end, convdata.py
- caffe: github.com/BVLC/caffe, models/bvlc_alexnet/{solver,train_val}.prototxt
- torchvision: its references/classification, as its weights for AlexNet were trained
- fast: ours; large batches in bfloat16 by the rules of Goyal et al., arXiv 1706.02677
"""

from __future__ import annotations

from typing import Any

_2012: dict[str, Any] = {
    "batch_size": 128,
    "lr": 0.01,
    "rule": "2012",
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "warmup": 0.0,
    "lr_gamma": 0.1,
    "dropout": 0.5,
    "init": "variant",
    "precision": "fp32",
    "transform": "crop",
    "colour_noise": 0.1,
    "ten_crop": True,
}

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        **_2012,
        "variant": "paper",
        "epochs": 90,
        "schedule": "plateau",
        "lr_patience": 5,
        "lr_cuts": 3,
    },
    "alex2012": {
        **_2012,
        "variant": "alex2012",
        "epochs": 91,
        "schedule": "multistep",
        "lr_milestones": (25.0, 51.0, 79.0),  # where its author cut the rate by hand
        "bias_lr": 2.0,
        "bias_decay": 0.0,
        "colour_divisor": 1.1,
    },
    "caffe": {
        **_2012,  # Caffe's SGD has the rate inside the velocity too
        "variant": "caffe",
        "batch_size": 256,
        "epochs": 90,
        "schedule": "step",
        "lr_step": 20.0,  # 100,000 steps of 256 of ImageNet's 1,281,167 images are 19.98 epochs
        "bias_lr": 2.0,
        "bias_decay": 0.0,
        "colour_noise": 0.0,
        "ten_crop": False,
    },
    "torchvision": {
        "variant": "torchvision",
        "batch_size": 256,
        "epochs": 90,
        "lr": 0.01,
        "rule": "torch",
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "warmup": 0.0,
        "schedule": "step",
        "lr_step": 30.0,
        "lr_gamma": 0.1,
        "dropout": 0.5,
        "init": "variant",
        "precision": "fp32",
        "transform": "resized-crop",
    },
    "fast": {
        "variant": "torchvision",
        "batch_size": 1024,
        "epochs": 90,
        "lr": 0.04,  # torchvision's, times the batch over 256
        "rule": "torch",
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "warmup": 5.0,
        "schedule": "cosine",
        "dropout": 0.5,
        "init": "kaiming",
        "precision": "bf16",
        "transform": "crop",
    },
}
# What a recipe says about photographs alone: the small grey sets keep their own values.
OF_PHOTOGRAPHS = frozenset({"transform", "colour_noise", "colour_divisor", "ten_crop"})
