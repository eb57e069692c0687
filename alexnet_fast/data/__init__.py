"""Labelled images: where they come from, how they are cropped, and how ranks share them."""

from alexnet_fast.data.images import BadImage, read_image
from alexnet_fast.data.loader import NOT_COUNTED, Batch, evaluation_batches, training_batches
from alexnet_fast.data.sources import Data, open_data
from alexnet_fast.data.transforms import Transform

__all__ = [
    "NOT_COUNTED",
    "BadImage",
    "Batch",
    "Data",
    "Transform",
    "evaluation_batches",
    "open_data",
    "read_image",
    "training_batches",
]
