"""Training, evaluation and prediction: one loop for one process or many."""

from alexnet_fast.train.commands import train, train_seeds
from alexnet_fast.train.config import TrainConfig
from alexnet_fast.train.inference import evaluate_checkpoint, predict
from alexnet_fast.train.page import write_page
from alexnet_fast.train.report import compare

__all__ = ["TrainConfig", "compare", "evaluate_checkpoint", "predict", "train", "train_seeds", "write_page"]
