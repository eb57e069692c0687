"""Where a run's scalars go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, each imported when asked for.

A resumed run goes on with the record that it began: TensorBoard finds it by the step, the others by an id.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from alexnet_fast.errors import InputError, needs
from alexnet_fast.train.config import TrainConfig

PROJECT = "alexnet_fast"  # what the run belongs to there, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME say otherwise
MLFLOW_ID = "mlflow.id"  # in the run's folder


class Tracker(Protocol):
    name: str

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    name = "tensorboard"

    def __init__(self, config: TrainConfig, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(Path(config.out) / "tensorboard"), purge_step=step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    name = "wandb"

    def __init__(self, config: TrainConfig, step: int):
        import wandb

        run = Path(config.out).resolve()
        self.run = wandb.init(
            project=None if wandb.Settings().project else PROJECT,
            name=run.name,
            id=hashlib.sha256(str(run).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(run),
            config=config.to_json(),
            settings=wandb.Settings(console="off"),
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    name = "mlflow"

    def __init__(self, config: TrainConfig, step: int):
        import mlflow

        self.mlflow, file = mlflow, Path(config.out) / MLFLOW_ID
        known = file.read_text() if step and file.exists() else None
        if known is None and not mlflow.environment_variables.MLFLOW_EXPERIMENT_NAME.get():
            mlflow.set_experiment(PROJECT)
        run = mlflow.start_run(run_id=known, run_name=Path(config.out).name)
        file.write_text(run.info.run_id)
        if known is None:
            mlflow.log_params(config.to_json())

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


TRACKERS: tuple[type[Tracker], ...] = (TensorBoard, Wandb, MLflow)


def wanted(config: TrainConfig) -> list[type[Tracker]]:
    """Those that ``config`` asks for; raises :class:`InputError` where one's package is missing."""
    asked = [tracker for tracker in TRACKERS if getattr(config, tracker.name)]
    for tracker in asked:
        needs(f"--{tracker.name}", tracker.name)
    return asked


def opened(config: TrainConfig, step: int) -> list[Tracker]:
    """What ``config`` asks for, ready for scalars from ``step`` on. Raises :class:`InputError` where one refuses, as
    for want of an account."""
    trackers: list[Tracker] = []
    for tracker in wanted(config):
        try:
            trackers.append(tracker(config, step))
        except Exception as error:  # of packages that talk to servers: anything
            for before in trackers:
                before.close()
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"--{tracker.name}: {reason}") from error
    return trackers
