"""Training, evaluation and prediction: one loop for one process or many."""

from alexnet_fast.train.commands import train
from alexnet_fast.train.config import TrainConfig
from alexnet_fast.train.inference import evaluate_checkpoint, predict

__all__ = ["TrainConfig", "evaluate_checkpoint", "predict", "train"]
