"""How a training step is shared out: the interface of the modes, and data parallelism, the plain one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from alexnet_fast.graphs import Graphed
from alexnet_fast.parallel.collectives import bytes_of, gather
from alexnet_fast.parallel.dropout import BatchDropout
from alexnet_fast.parallel.ranks import Ranks


@dataclass(frozen=True)
class Step:
    """What the modes need to know of a run.

    ``criterion`` sums the loss over the images that count, those whose label is not its ``ignore_index``. ``context``
    is what the forward pass runs under (autocast). ``bf16_gradients``: gradients travel in bfloat16.
    """

    criterion: nn.CrossEntropyLoss
    context: Callable[[], contextlib.AbstractContextManager]
    image_size: int
    bf16_gradients: bool = False
    scheme: str = "a"  # of hybrid
    parts: int = 1  # that a step's images are computed in, one after the other


@dataclass(frozen=True)
class Mixed:
    """How the loss of mixed images is made: ``share`` of it by their own labels, the rest by ``labels``, those of the
    images that were mixed in."""

    labels: Tensor
    share: float


class Split:
    """Data parallelism, and what the other modes change of it.

    ``whole`` is the net as one process has it; :meth:`collect` brings it up to date. ``net`` is this rank's part, with
    the parameters' names of the whole. ``loads`` is (rank, world): which share of each batch the rank has to load.
    """

    def __init__(self, whole: nn.Module, dropouts: list[BatchDropout], ranks: Ranks, step: Step) -> None:
        self.whole, self.dropouts, self.ranks, self.step = whole, dropouts, ranks, step
        self.dims: dict[str, int] = {}  # along which a parameter is split; the others are whole on each rank
        self.loads = (ranks.rank, ranks.world)
        self.net = self._part()
        self.graphed: Graphed | None = None

    def _part(self) -> nn.Module:
        self.parallel = data_parallel(self.whole, self)
        return self.whole

    def train(
        self,
        images: Tensor,
        labels: Tensor,
        counted: int,
        update: Callable[[], None],
        mixed: Mixed | None = None,
    ) -> Tensor:
        """One step on this rank's images of a batch of ``counted``; ``update`` moves the weights that have gradients.

        Images are normalized, (n, 3, side, side). Returns loss, hits and images counted, float64, which summed over
        ranks are the batch's.
        """
        if self.graphed is not None:
            return self.graphed(images, labels, constants=(counted,))
        figures = self._gradients(images, labels, counted, mixed)
        update()
        return figures

    def replay(self, update: Callable[[], None], optimizer: torch.optim.Optimizer) -> None:
        """Lets :meth:`train` replay its steps on CUDA, with the same bits. It is for one rank, which exchanges no
        gradients, and for steps of one part without mixed images. ``update`` is what train() is given."""
        device = self.ranks.device

        def work(images: Tensor, labels: Tensor, counted: int) -> Tensor:
            optimizer.zero_grad()
            return self._gradients(images, labels, counted)

        def seeded() -> list[torch.Generator]:
            return [dropout.seeded(device) for dropout in self.dropouts]

        if self.ranks.world == 1 and self.step.parts == 1:
            self.graphed = Graphed(
                *(work, update, self.net, optimizer), warmup=3, most=4, name="train", generators=seeded, proved=True
            )

    def _gradients(self, images: Tensor, labels: Tensor, counted: int, mixed: Mixed | None = None) -> Tensor:
        """Adds this step's gradients to the parameters'; returns what :meth:`train` does."""
        rows = self.ranks.rank + self.ranks.world * torch.arange(len(images), device=self.ranks.device)
        others = mixed.labels if mixed else labels
        share = mixed.share if mixed else 1.0
        figures = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)
        chunks = [tensor.chunk(self.step.parts) for tensor in (images, labels, others, rows)]
        for number, (part, wanted, other, places) in enumerate(zip(*chunks, strict=True), 1):
            self.place(places)
            last = number == len(chunks[0])
            with contextlib.nullcontext() if last or self.parallel is self.net else self.parallel.no_sync():
                with self.step.context():
                    logits = self.parallel(part).float()
                loss = self.step.criterion(logits, wanted)
                if mixed:
                    loss = share * loss + (1 - share) * self.step.criterion(logits, other)
                # DDP takes the mean of the ranks' gradients, and their shares may differ by an image: this factor makes
                # it the mean over images.
                (loss * (self.ranks.world / counted)).backward()
            figures += self.figures(loss, logits, wanted)
        return figures

    def place(self, rows: Tensor) -> None:
        """Tells the dropouts which rows of the batch follow. Rows beyond it do not count, so any mask will do."""
        for dropout in self.dropouts:
            dropout.rows = (rows % dropout.batch).to(self.ranks.device)

    def split_dropouts(self, classifier: nn.Sequential) -> None:
        """Makes ``dropouts`` those of ``classifier``. All but the one before fc6 see this rank's part of the
        features."""
        self.dropouts, columns = [], (0, 1)
        for module in classifier:
            if isinstance(module, nn.Linear):
                columns = (self.ranks.rank, self.ranks.world)
            elif isinstance(module, BatchDropout):
                module.columns = columns
                self.dropouts.append(module)

    def figures(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        hits = (logits.detach().argmax(1) == labels).sum()
        count = (labels != self.step.criterion.ignore_index).sum()
        return torch.stack([figure.double() for figure in (loss.detach(), hits, count)])

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of the parameter ``name``, or of its momentum."""
        dim = self.dims.get(name)
        return whole if dim is None else whole.chunk(self.ranks.world, dim)[self.ranks.rank]

    def joined(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameters, or momentum, as one process has them. Every rank has to call it, with the same keys."""
        return {
            name: gather(tensor.detach(), self.ranks, "weights", self.dims[name]) if name in self.dims else tensor
            for name, tensor in tensors.items()
        }

    def collect(self) -> None:
        """Brings ``whole`` up to date on every rank."""
        if self.net is not self.whole:
            self.whole.load_state_dict(self.joined(self.net.state_dict()))


def data_parallel(module: nn.Module, split: Split) -> nn.Module:
    """``module`` with its gradients averaged over ranks while the backward pass goes on.

    DDP sums gradients in buckets of 25 MB, in the order in which they are ready: fc8, fc7, fc6, then the convolutions.
    The linear layers have 94% of all bytes, and these travel while the convolutions are differentiated.
    """
    ranks, step = split.ranks, split.step
    if ranks.world == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    parallel = DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
    reduce = default_hooks.bf16_compress_hook if step.bf16_gradients else default_hooks.allreduce_hook

    def counted(group, bucket):  # DDP refuses annotations that are strings
        size = 2 * bucket.buffer().numel() if step.bf16_gradients else bytes_of(bucket.buffer())
        ranks.sent["gradients"] += 2 * (ranks.world - 1) * size // ranks.world
        return reduce(group, bucket)

    parallel.register_comm_hook(None, counted)
    # DDP forms its buckets anew after the first backward pass. With three ranks or more that changes the order of
    # additions, and a resumed run would differ in its last bits; so one pass comes before the first step.
    split.place(torch.zeros(1, dtype=torch.int64))
    with step.context():
        parallel(torch.zeros(1, 3, step.image_size, step.image_size, device=ranks.device)).sum().backward()
    for parameter in module.parameters():
        parameter.grad = None
    ranks.sent.clear()
    return parallel
