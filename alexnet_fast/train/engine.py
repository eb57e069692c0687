"""The training loop of one rank.

A step depends on (weights, momentum, seed, epoch, position) alone: images, augmentation and dropout are drawn by
counters, the learning rate is a function of the step, and every rank adds up the same numbers in the same order. So a
run that was killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from alexnet_fast import tuning
from alexnet_fast.data import NOT_COUNTED, Batch, Data, Transform, training_batches
from alexnet_fast.data.loader import steps_per_epoch, worker_deaths_named
from alexnet_fast.data.random import mix
from alexnet_fast.data.records import read_json
from alexnet_fast.data.stored import CachedImages
from alexnet_fast.errors import InputError, RunError
from alexnet_fast.malloc import keep_memory
from alexnet_fast.parallel import MODES, Ranks, Split, Step, split_dropouts
from alexnet_fast.train import checkpoint, pictures
from alexnet_fast.train.average import Average
from alexnet_fast.train.badfiles import SETS, BadFiles
from alexnet_fast.train.checkpoint import WEIGHT, Checkpoint, Saver
from alexnet_fast.train.config import TrainConfig
from alexnet_fast.train.evaluate import CONFUSION_CLASSES, Evaluation, augmented, autocast, evaluate, fold_for, using
from alexnet_fast.train.mixing import mix_images
from alexnet_fast.train.optimizer import SLOTS, build_optimizer, restore
from alexnet_fast.train.report import Report, read_rows
from alexnet_fast.train.schedule import learning_rate, plateau
from alexnet_fast.train.stopping import Signal

DROPOUT_KEY = 0x64726F70  # keeps the dropout seeds apart from the keys of data/loader.py


def agreed(config: TrainConfig, ranks: Ranks) -> dict[str, str]:
    """The convolution that every rank takes, by the form of its arguments: the one that the run has taken before, or
    else the one that was measured on the first rank's device. The shipped table answers for all other forms; nothing is
    measured during a run."""
    measured = {form: record.candidate for form, record in tuning.measured(ranks.device).items()}
    return ranks.gather({**measured, **config.choices})[0]


class Stopped(Exception):
    """SIGINT or SIGTERM arrived while the newest checkpoint already held the present state of the run."""


class Trainer:
    """A run on one rank, from its start or from ``resumed``; :meth:`run` carries it to its end.

    ``build`` makes the net on the CPU, with the same weights on each rank.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        data: Data,
        *,
        resumed: Checkpoint | None = None,
        restarts: int = 0,
        build: Callable[[TrainConfig], nn.Module],
        console: Console,
    ):
        self.config, self.ranks, self.data = config, ranks, data
        self.transform = Transform(config.transform, config.image_size)
        self.epoch_steps = steps_per_epoch(len(data.train), config.step_images)
        self.state = {**checkpoint.START, "sizes": {"train": len(data.train), "val": len(data.val)}}
        self.resumed = resumed
        model = build(dataclasses.replace(config, weights=None) if resumed else config)
        stored: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        if resumed:
            self.state = {**resumed.state, "restarts": restarts}
            stored, kept = resumed.read(model)
            own = {key.removeprefix(WEIGHT): value for key, value in kept.items() if key.startswith(WEIGHT)}
            model.load_state_dict({**stored, **own})
        if config.fold == "auto":
            folds = ranks.gather(fold_for(model, config, ranks.device, training=True) is not None)[0]
            self.config = config = dataclasses.replace(config, fold="on" if folds else "off")
        self.fold = fold_for(model, config, ranks.device, training=True)
        self.split = self._split(model)
        self.model = self.split.whole
        if config.cache == "device":
            self.data = dataclasses.replace(data, train=CachedImages(data.train, ranks.device, *self.split.loads))
        net = self.split.net
        self.names = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
        self.optimizer = build_optimizer(config, self.names)
        self.slots = SLOTS[config.optimizer]
        for key, value in kept.items():
            prefix, colon, name = key.rpartition(":")
            if prefix + colon in self.slots and name in self.names:
                slot, part = self.slots[prefix + colon], self.split.part(name, value)
                restore(self.optimizer, self.names[name], slot, part, self.state["step"])
        if config.graph and config.optimizer == "sgd" and not config.mixup and not config.cutmix:
            self.split.replay(self._update, self.optimizer)
        self.average: Average | None = None
        if config.model_ema:
            source = stored or model.state_dict()
            self.average = Average(self.split, source, config.model_ema_decay, config.model_ema_steps)
        self.saver = Saver(Path(config.out))
        ranks.sent.update(self.state["sent"])
        self.pending: tuple[Tensor, int, float] | None = None  # sums of the newest step, its images, its lr
        self.bad = BadFiles(ranks, dict(zip(SETS, (len(data.train), len(data.val)), strict=True)), config.max_bad)
        self.result: Evaluation | None = None
        self.confusion: Tensor | None = None  # of the newest evaluation, (classes, classes), by label and answer
        self.told_no_matplotlib = False
        self.signal = Signal()  # what this rank was sent
        self.stopping = False  # whether all ranks know that one of them has to stop
        self.failure: InputError | None = None  # why they stop, unless for a signal
        self.started = time.perf_counter() - self.state["seconds"]
        self.report: Report | None = None
        self.console = console

    def run(self) -> int:
        """Trains to the end; returns the exit code: 0, or 128 + the signal that stopped the run."""
        with contextlib.ExitStack() as stack:
            if self.ranks.main:
                run = Path(self.config.out)
                stack.callback(self.saver.finish)
                if self.resumed:
                    checkpoint.point(run, "last", self.resumed.path.name)
                self.report = Report(
                    self.config,
                    self.console,
                    step=self.state["step"],
                    steps=self._last_step(),
                    metrics_bytes=self.state["metrics_bytes"],
                )
                stack.callback(self.report.close)
            self.bad.restore(read_rows(run) if self.ranks.main else ())
            if self.ranks.device.type == "cpu":
                keep_memory()
            stack.enter_context(self.signal.heard())
            stack.enter_context(using(self.config.backend))
            stack.enter_context(tuning.pinned(agreed(self.config, self.ranks)))
            stack.enter_context(_deterministic())
            stack.enter_context(worker_deaths_named())
            try:
                return self._run()
            except Stopped:
                return self._stopped()

    # ------------------------------------------------------------------------ the course of a run

    def _run(self) -> int:
        if not self.resumed:
            self._save()  # so that a run killed in its first steps can be resumed
        if self.state["evaluate"]:
            self._end_epoch()
        while self.state["epoch"] < self.config.epochs and self.state["step"] < self._last_step() and not self._stale():
            self._train_epoch()
            ended = self.state["position"] == self.epoch_steps
            if ended:
                self.state |= {"epoch": self.state["epoch"] + 1, "position": 0, "evaluate": True}
            self._save()
            if self.stopping:
                return self._stopped()
            if ended:
                self._end_epoch()
        if self.state["position"]:
            self._evaluate("stop", {"epoch": self.state["epoch"]})
        if self._stale() and self.report:
            self.report.line(f"stopped early: {self.state['stale']} epochs without a better held-out accuracy")
        self._say_result()
        return 0

    def _train_epoch(self) -> None:
        """Trains from ``position`` to the end of the epoch, to --max-steps, or to a signal."""
        state, config = self.state, self.config
        self.split.net.train()
        if self.report:
            self.report.restart_clock()
        batches = training_batches(
            self.data.train,
            self.transform,
            seed=config.seed,
            epoch=state["epoch"],
            first=state["position"],
            batch_size=config.step_images,
            rank=self.split.loads[0],
            world=self.split.loads[1],
            workers=config.workers,
            device=self.ranks.device,
        )
        self.since = time.perf_counter()
        with contextlib.closing(batches):
            for batch in batches:
                self._settle()
                if self.stopping:
                    break
                self._step(batch)
                state["step"] += 1
                state["position"] += 1
                if state["step"] == self._last_step():
                    break
                if config.checkpoint_steps and state["step"] % config.checkpoint_steps == 0:
                    self._settle()
                    if state["position"] < self.epoch_steps and not self.stopping:
                        self._save()
        self._settle()

    def _step(self, batch: Batch) -> None:
        config, ranks, step = self.config, self.ranks, self.state["step"]
        torch.manual_seed(mix(config.seed, step, DROPOUT_KEY) >> 1)
        for layer, dropout in enumerate(self.split.dropouts):
            dropout.seed = mix(config.seed, step, layer, DROPOUT_KEY) >> 1
        cuts = self.state["plateau"]["cuts"]
        lr = learning_rate(config, step, self.epoch_steps, cuts)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, self.epoch_steps, cuts, group["base"])
        labels = batch.labels.to(ranks.device, non_blocking=True)
        images = augmented(batch, config, ranks.device, self.state["epoch"], self.fold)
        images, mixed = mix_images(config, step, images, labels)
        figures = self.split.train(images, labels, batch.counted, self._update, mixed)
        if self.average:
            self.average.move(step + 1)
        self.bad.meet(batch.bad)
        flags = torch.tensor([len(self.bad.new), bool(self.signal.number)], dtype=torch.float64, device=ranks.device)
        self.pending = (ranks.add(torch.cat([figures, flags])), batch.counted, lr)

    def _update(self) -> None:
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.names.values(), self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _settle(self) -> None:
        """Reads the sums of the newest step: one step late, so that the host never waits for a GPU between two
        steps."""
        if self.pending is None:
            return
        (values, images, lr), self.pending = self.pending, None
        loss, hits, count, new_bad, signals = values.tolist()
        state = self.state
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} at step {state['step']}, lr {lr:g}: lower --lr or lengthen --warmup; "
                f"checkpoints in {self.config.out} are from before"
            )
        for sums in ("sums", "logged"):
            state[sums] = [a + b for a, b in zip(state[sums], (loss, hits, count), strict=True)]
        now = time.perf_counter()
        state["trained_images"] += images
        state["trained_seconds"] += now - self.since
        self.since = now
        self.stopping = self.stopping or signals > 0
        log = None
        if state["step"] % self.config.log_steps == 0 or state["position"] == self.epoch_steps:
            loss, hits, count = state["logged"]
            log = {"loss": loss / max(count, 1), "top1": hits / max(count, 1), "lr": lr}
            state["logged"] = [0.0, 0.0, 0.0]
        if self.report:
            self.report.step(state["epoch"], state["step"], images, log)
        if new_bad:
            try:
                self.bad.share_new(self.report, state["step"])
            except InputError as error:
                self.failure, self.stopping = error, True

    def _end_epoch(self) -> None:
        """Evaluates at the end of an epoch, whose checkpoint is saved already."""
        loss, hits, count = self.state["sums"]
        trained = {"train_loss": loss / max(count, 1), "train_top1": hits / max(count, 1)}
        result = self._evaluate("epoch", {"epoch": self.state["epoch"] - 1, **trained})
        best = self.state["best"]
        if best is None or result.top1 > best["val_top1"]:
            self.state |= {"best": {"step": self.state["step"], "val_top1": result.top1}, "stale": 0}
            if self.ranks.main:
                self.saver.finish()
                checkpoint.point(Path(self.config.out), "best", checkpoint.folder_name(self.state["step"]))
        else:
            self.state["stale"] += 1
        if self.config.schedule == "plateau":
            self.state["plateau"] = plateau(self.config, self.state["plateau"], result.top1)
        self.state |= {"sums": [0.0, 0.0, 0.0], "evaluate": False}

    def _evaluate(self, kind: str, row: dict[str, Any]) -> Evaluation:
        counts, classes = None, self.config.num_classes
        if classes <= CONFUSION_CLASSES:
            counts = torch.zeros(classes, classes, dtype=torch.int64, device=self.ranks.device)
        with self.average.in_place(self.model) if self.average else contextlib.nullcontext():
            result, bad = evaluate(
                self.model, self.data.val, self.config, self.ranks, self._after_evaluating, confusion=counts
            )
        self.confusion = counts
        self.bad.share(bad, "held-out", self.report, self.state["step"])
        self.result = result
        if self.report:
            row |= {
                "step": self.state["step"],
                "val_loss": result.loss,
                "val_top1": result.top1,
                "val_top5": result.top5,
            }
            self.report.evaluated(kind, {**row, "count": result.count, "seconds": round(self._seconds(), 2)})
            self._draw()
        return result

    # ------------------------------------------------------------------------ its pieces

    def _stale(self) -> bool:
        patience = self.config.early_stopping
        return patience is not None and self.state["stale"] >= patience

    def _split(self, model: nn.Module) -> Split:
        """``model`` on this rank's device, shared out as --parallel says."""
        config, ranks = self.config, self.ranks
        # Masks are drawn for the batch of all ranks, so that many ranks drop what one process would drop.
        dropouts = split_dropouts(model, min(config.step_images, len(self.data.train)))
        step = Step(
            nn.CrossEntropyLoss(reduction="sum", ignore_index=NOT_COUNTED, label_smoothing=config.label_smoothing),
            lambda: autocast(config, ranks.device),
            config.image_size,
            config.gradients == "bf16",
            config.hybrid_scheme,
            config.accumulate,
        )
        with using(config.backend):
            return MODES[config.parallel](
                model.to(ranks.device, memory_format=torch.channels_last), dropouts, ranks, step
            )

    def _last_step(self) -> int:
        steps = self.config.epochs * self.epoch_steps
        return min(steps, self.config.max_steps or steps)

    def _seconds(self) -> float:
        """Time spent in this run, what came before a resume included."""
        return time.perf_counter() - self.started

    def _save(self) -> None:
        """Brings ``model`` up to date, and starts to write a checkpoint of this step."""
        state = self.optimizer.state
        kept: dict[str, Tensor] = {}
        for prefix, slot in self.slots.items():
            own = {name: state[p].get(slot) for name, p in self.names.items() if p in state}
            own = self.split.joined({name: value for name, value in own.items() if value is not None})
            kept |= {prefix + name: value for name, value in own.items()}
        if self.state["step"]:  # before the first step the whole net is what it was built as
            self.split.collect()
        self._note_choices()
        weights = self.model.state_dict()
        if self.average:
            kept |= {WEIGHT + name: value for name, value in weights.items()}
            weights = self.average.whole()
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise RunError(f"weights are not finite after step {self.state['step']}: lower --lr or lengthen --warmup")
        if self.report:
            seconds = round(self._seconds(), 2)
            self.state |= {"metrics_bytes": self.report.flushed(), "seconds": seconds, "sent": dict(self.ranks.sent)}
            self.saver.start(weights, kept, config=self.config, classes=self.data.classes, state=self.state)
            self.report.restart_clock()

    def _note_choices(self) -> None:
        """Adds to the configuration which convolutions were chosen since the last checkpoint, by all ranks."""
        choices = dict(self.config.choices)
        for used in reversed(self.ranks.gather(tuning.used())):
            choices |= used
        if choices != self.config.choices:
            self.config = dataclasses.replace(self.config, choices=choices)
            if self.ranks.main:
                with contextlib.suppress(OSError, ValueError):  # the checkpoint has them too
                    path = Path(self.config.out, checkpoint.CONFIG)
                    record = {**read_json(path), "choices": choices}
                    path.write_text(json.dumps(record, indent=2) + "\n")

    def _draw(self) -> None:
        run = Path(self.config.out)
        pictures.draw_filters(self.model, self.state["step"], run / "conv1.png")
        try:
            pictures.draw_curves(read_rows(run), run / "curves.png")
        except ImportError:
            if not self.told_no_matplotlib:
                self.report.line("no curves.png: matplotlib is not installed (pip install matplotlib)")
            self.told_no_matplotlib = True

    def _after_evaluating(self, images: int) -> None:
        if self.signal.number:
            raise Stopped
        if self.report:
            self.report.evaluating(images * self.ranks.world, len(self.data.val))

    def _stopped(self) -> int:
        self.saver.finish()
        if self.stopping:  # the launcher ends all ranks soon after the first, even one that is writing a file
            self.ranks.wait()
        if self.failure:
            raise self.failure
        number = self.signal.number or signal.SIGTERM
        if self.report:
            name = signal.Signals(number).name
            self.report.line(f"stopped by {name} at step {self.state['step']}; go on with --resume {self.config.out}")
        return 128 + number

    def _say_result(self) -> None:
        if not self.report:
            return
        self.saver.finish()
        bad = {kind: len(files) for kind, files in self.bad.known.items()}
        if self.confusion is not None and self.result:
            self.report.confused(self.confusion.cpu(), self.data.classes)
        self.report.finished(self.result, self.state, self._seconds(), dict(self.ranks.sent), bad)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
