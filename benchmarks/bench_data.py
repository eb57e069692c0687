"""Training batches of 128 crops of 224 from photographs of 500 x 375: prepared shards with the crop made on the device,
and JPEG files decoded image by image as torchvision's reference scripts do (RandomResizedCrop, mirror, ToTensor,
Normalize, here in Pillow and torch). Both with one process or thread a core, for whole epochs; the processes of torch's
DataLoader are started once and stay.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from alexnet_fast.data import open_data, training_batches
from alexnet_fast.data.prepare import prepare
from alexnet_fast.data.transforms import Transform
from alexnet_fast.train.config import TrainConfig, resolve
from alexnet_fast.train.evaluate import augmented

from .timing import row_of

BATCH, CLASSES, PHOTOGRAPHS = 128, 2, 128  # of each class
CORES = len(os.sched_getaffinity(0))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def photograph(seed: int) -> Image.Image:
    """Smooth shapes under fine noise: about 70 kB as JPEG, as ImageNet's of this size."""
    draw = np.random.default_rng(seed)
    smooth = Image.fromarray(draw.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(smooth) + draw.normal(0, 9, (375, 500, 3))).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "photographs"
    for part, count in (("train", PHOTOGRAPHS), ("val", 1)):
        for label in range(CLASSES):
            (root / part / str(label)).mkdir(parents=True)
            for number in range(count):
                photograph(1000 * label + number).save(root / part / str(label) / f"{number}.jpg", quality=90)
    prepare(root, root.parent / "shards")
    return root


class Files(Dataset):
    """The usual pipeline: each image is decoded and cropped anew in every epoch."""

    def __init__(self, folder: Path, config: TrainConfig):
        self.paths = sorted((folder / "train").glob("*/*.jpg"))
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        image = image.resize((224, 224), Image.Resampling.BILINEAR, box=self._box(*image.size))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return (pixels.float() / 255 - self.mean) / self.std, int(self.paths[index].parent.name)

    @staticmethod
    def _box(width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * random.uniform(0.08, 1)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w <= width and h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        return 0, 0, width, height


def files(loader: DataLoader) -> Iterator[Tensor]:
    for images, _ in loader:
        yield images.to(DEVICE, non_blocking=True)


def shards(folder: Path, config: TrainConfig) -> Iterator[Tensor]:
    split = open_data(str(folder.parent / "shards")).train
    options = {"seed": 0, "epoch": 0, "first": 0, "batch_size": BATCH, "rank": 0, "world": 1}
    for batch in training_batches(split, Transform("crop", 224), **options, workers=CORES, device=DEVICE):
        yield augmented(batch, config, DEVICE, 0)


def test_feed(benchmark, keep, folder: Path):
    config = resolve({"data": str(folder), "out": "", "recipe": "torchvision", "transform": "crop"}, CLASSES)
    images = CLASSES * PHOTOGRAPHS

    options = {"shuffle": True, "num_workers": CORES, "pin_memory": DEVICE.type == "cuda", "persistent_workers": True}
    loader = DataLoader(Files(folder, config), BATCH, **options)

    def epoch(batches: Iterator[Tensor]) -> None:
        with contextlib.closing(batches):
            assert sum(map(len, batches)) == images
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    sides = {"ours": lambda: epoch(shards(folder, config)), "Pillow and DataLoader": lambda: epoch(files(loader))}
    labels = {"bench": "data", "case": f"{images} photographs of 500x375", "dtype": "float32"}
    labels |= {"layout": "channels_last", "pass": "epoch", "backend": DEVICE.type}
    row = row_of(benchmark, sides, labels, "cpu", seconds=4, least=3)  # wall time on GPUs too: the work is the CPU's
    keep(row and row | {"images": images})
