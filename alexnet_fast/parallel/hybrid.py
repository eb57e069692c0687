"""Data-parallel convolutions, model-parallel linear layers: "One weird trick" (Krizhevsky 2014, arXiv 1404.5997).

Of K ranks each runs the convolutions on its 1/K of a batch and holds 1/K of the linear layers, with their momentum:
fc6 and fc7 by output features, fc8 by input features. What the convolutions made reaches the linear layers

    a   from all ranks at once: one pass over the whole batch
    b   from one rank at a time: K passes, of one rank's images each
    c   a Kth from each rank at a time: K passes, of images of all ranks

and its gradient goes back the same way. In (a) all weights move once a step, as in one process. In (b) and (c) the
linear layers move after each pass, by the mean gradient over its images; the convolutions once a step in each.

A rank sends, for a batch of N, float32 and the paper's sizes, in forward and backward together about

    (K−1)/K · N · 4 bytes · (2 · 9216 + 2 · 4096 + 2 · classes)     activations: 7.3 MB for N = 128, K = 2, classes 1000
    (K−1)/K · 4 bytes · 2 · 2,334,080                               gradients of the convolutions: 9.3 MB for K = 2
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_fast.parallel.collectives import bytes_of, gather, gather_features, sum_parts, sum_scattered
from alexnet_fast.parallel.split import Split, data_parallel

FEATURES = 4096  # of fc6 and fc7


def refusal(world: int, features: int = FEATURES) -> str:
    """Why linear layers of so many features cannot be shared by ``world`` ranks; or ''."""
    if features % world:
        return f"hybrid needs a number of ranks that divides the {features} features of fc6 and fc7, got {world}"
    return ""


class Hybrid(Split):
    def _part(self) -> nn.Module:
        net = copy.deepcopy(self.whole)
        self.linears = [at for at, module in enumerate(net.classifier) if isinstance(module, nn.Linear)]
        for at in self.linears:
            last = at == self.linears[-1]
            linear = net.classifier[at]
            self.dims[f"classifier.{at}.weight"] = 1 if last else 0
            if not last:
                self.dims[f"classifier.{at}.bias"] = 0
            for name, parameter in linear.named_parameters():
                part = self.part(f"classifier.{at}.{name}", parameter.detach()).clone()
                setattr(linear, name, nn.Parameter(part, parameter.requires_grad))
            linear.out_features, linear.in_features = linear.weight.shape
        self.split_dropouts(net.classifier)
        self.convolutions = data_parallel(net.features, self)
        return net

    def train(
        self, images: Tensor, labels: Tensor, counted: int, update: Callable[[], None], mixed: None = None
    ) -> Tensor:
        world, scheme = self.ranks.world, self.step.scheme
        passes = 1 if scheme == "a" else world
        # Every rank and every pass needs the same number of rows; those that are added do not count.
        share = -(-counted // world)
        if scheme == "c":
            share = -(-share // world) * world
        missing = share - len(images)
        images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing))
        labels = F.pad(labels, (0, missing), value=self.step.criterion.ignore_index)
        along = 0 if scheme == "b" else 1
        labels = gather(labels, self.ranks, "activations").view(world, share).chunk(passes, along)
        rows = torch.arange(world)[:, None] + world * torch.arange(share)  # [r, i]: image i of rank r, in the batch
        rows = rows.chunk(passes, along)
        with self.step.context():
            features = self.convolutions(images)
        sent = features.detach().contiguous()
        gradient = torch.empty_like(sent)
        figures = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)
        for number, x in enumerate(self._passes(sent, passes)):
            x.requires_grad_(features.requires_grad)
            self.place(rows[number].flatten())
            with self.step.context():
                logits = self._classify(x).float()
            loss = self.step.criterion(logits, labels[number].flatten())
            (loss / counted).backward()
            figures += self.figures(loss, logits, labels[number].flatten())
            if features.requires_grad:
                self._return(x.grad, gradient, number, passes)
            of_pass = int((rows[number] < counted).sum())
            if passes > 1:
                for parameter in self.net.classifier.parameters():
                    # Gradients of a pass without images are 0, and momentum would still move the layers.
                    parameter.grad = parameter.grad.mul_(counted / of_pass) if of_pass else None
                if of_pass:
                    update()
        if features.requires_grad:
            features.backward(gradient * world)  # DDP takes the mean over ranks, and here the sum is wanted
            update()
        elif passes == 1:
            update()
        return figures * self.ranks.main

    def _passes(self, features: Tensor, passes: int) -> Iterator[Tensor]:
        """The inputs of the linear layers' passes. All exchanges are started before the first one is waited for."""
        ranks = self.ranks
        if ranks.world == 1:
            yield features
            return
        if self.step.scheme == "b":
            parts = [features if rank == ranks.rank else torch.empty_like(features) for rank in range(passes)]
            under_way = [dist.broadcast(part, rank, async_op=True) for rank, part in enumerate(parts)]
        else:
            own = [part.contiguous() for part in features.chunk(passes)]
            gathered = [part.new_empty((ranks.world, *part.shape)) for part in own]
            under_way = [
                dist.all_gather(list(out.unbind(0)), part, async_op=True)
                for out, part in zip(gathered, own, strict=True)
            ]
            parts = [out.flatten(0, 1) for out in gathered]
        ranks.sent["activations"] += (ranks.world - 1) * bytes_of(features)
        for part, work in zip(parts, under_way, strict=True):
            work.wait()
            yield part.detach()

    def _return(self, dx: Tensor, gradient: Tensor, number: int, passes: int) -> None:
        """Adds up over ranks the gradient of pass ``number``, into the rows of ``gradient`` that it belongs to."""
        ranks = self.ranks
        if self.step.scheme != "b" or ranks.world == 1:
            gradient.chunk(passes)[number].copy_(sum_scattered(dx, ranks, "activations"))
            return
        dist.reduce(dx, number)
        if number == ranks.rank:
            gradient.copy_(dx)
        else:
            ranks.sent["activations"] += bytes_of(dx)

    def _classify(self, x: Tensor) -> Tensor:
        """The whole net's logits from the output of the convolutions."""
        net, (fc6, fc7, fc8) = self.net, self.linears
        x = torch.flatten(net.avgpool(x), 1)
        x = net.classifier[fc6:fc7](net.classifier[:fc6](x))
        x = net.classifier[fc7:fc8](gather_features(x, self.ranks))
        head = net.classifier[fc8]
        return sum_parts(F.linear(x, head.weight), self.ranks) + head.bias
