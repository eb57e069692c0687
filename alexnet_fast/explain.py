"""Why a net answered as it did: maps of the parts of an image that counted, and what a layer's channels look for.

Each function takes a net and a batch of images (N, 3, H, W) as the net takes them, and leaves the net as it was: its
mode (explain nets in ``eval()``), its hooks, and the ``grad`` of its parameters. ``target`` is the class that is asked
about: None for each image's likeliest, a number, or int64 (N,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from alexnet_fast.models.features import features, find_layers
from alexnet_fast.nn import SpatialResponseNorm


def grad_cam(net: nn.Module, images: Tensor, target: int | Tensor | None = None, layer: str = "relu5") -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391, equations 1 and 2)::

        map = ReLU(Σ_k α_k · A_k),    α_k = mean over the places of ∂score/∂A_k

    where A_k are the channels of ``layer`` and the score is the net's output for ``target``.

    Args:
        layer: name of a layer with maps, as :func:`alexnet_fast.features` takes it: of the paper, or of a module.

    Returns:
        (N, h, w), of the layer's size, not negative, in units of the score.
        ``torch.nn.functional.interpolate`` brings it to the images' size.

    Raises:
        ValueError: there is no such layer, with the nearest names, or it gives no maps; ``target`` is no class.
    """
    module = net.get_submodule(find_layers(net, [layer])[layer])
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        seen.append(output if output.requires_grad else output.requires_grad_())
        return output.clone()  # the layer after it may work in place

    hook = module.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            scores = _scores(net(images), target)
    finally:
        hook.remove()
    if not seen or seen[-1].dim() != 4:
        raise ValueError(f"layer: expected one that gives maps (N, C, h, w), got {layer!r}{_shape(seen)}")
    (slope,) = torch.autograd.grad(scores.sum(), seen[-1:])
    return (slope.mean((2, 3), keepdim=True) * seen[-1].detach()).sum(1).relu()


def _shape(seen: list[Tensor]) -> str:
    return f" of shape {tuple(seen[-1].shape)}" if seen else ", which did not run"


@torch.no_grad()
def occlusion(
    net: Callable[[Tensor], Tensor],
    images: Tensor,
    target: int | Tensor | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    fill: float = 0.0,
    batch_size: int = 64,
) -> Tensor:
    """How much of the score is lost where a square is covered (Zeiler and Fergus 2014, arXiv 1311.2901, section 4.2).

    Args:
        net: anything that gives (N, classes) for images; its output for ``target`` is the score. With a softmax behind
            it the map is in probability.
        window: the square's side in pixels; a sixth of the shorter side if not given.
        stride: pixels from one square to the next; half of ``window`` if not given. The last squares reach over the
            border.
        fill: what covers, in the images' units; 0 is the mean colour of normalized images.
        batch_size: covered images that go through the net at a time.

    Returns:
        (N, H, W): of each pixel the score whole less the score covered, averaged over the squares that covered it.

    Raises:
        ValueError: ``window`` is not positive, ``stride`` not from 1 to ``window``, or ``target`` no class.
    """
    height, width = images.shape[2:]
    window = max(1, min(height, width) // 6) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if window < 1:
        raise ValueError(f"window: expected a positive number of pixels, got {window}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride: expected from 1 to the window's {window} pixels, got {stride}")
    rows, columns = (range(0, max(1, side - window + stride), stride) for side in (height, width))
    places = [(row, column) for row in rows for column in columns]
    output = net(images)
    targets, whole = _targets(output, target), _scores(output, target)
    lost = torch.zeros(len(images), height, width, device=images.device)
    covered = torch.zeros(height, width, device=images.device)
    for row, column in places:
        covered[row : row + window, column : column + window] += 1
    for number, (image, score) in enumerate(zip(images, whole, strict=True)):
        for first in range(0, len(places), batch_size):
            part = places[first : first + batch_size]
            batch = image.repeat(len(part), 1, 1, 1)
            for one, (row, column) in zip(batch, part, strict=True):
                one[:, row : row + window, column : column + window] = fill
            scores = net(batch)[:, targets[number]]
            for drop, (row, column) in zip(score - scores, part, strict=True):
                lost[number, row : row + window, column : column + window] += drop
    return lost / covered


def guided_gradients(net: nn.Module, images: Tensor, target: int | Tensor | None = None) -> Tensor:
    """Guided backpropagation (Springenberg et al. 2015, arXiv 1412.6806, section 3.4): the score's gradient in the
    images, where each ReLU hands back what is positive alone, and only where its input was.

    Its ReLUs are the net's modules ``nn.ReLU``; functions in somebody's ``forward`` differentiate as ever.

    Returns:
        As ``images``: score for each unit of the net's input.

    Raises:
        ValueError: ``net`` has no module ``nn.ReLU``, or ``target`` is no class.
    """
    relus = [module for module in net.modules() if isinstance(module, nn.ReLU)]
    if not relus:
        raise ValueError("net: expected one with modules nn.ReLU, whose gradients are to be guided")

    def guide(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda slope: slope.clamp(min=0))

    hooks = [module.register_forward_hook(guide) for module in relus]
    try:
        with torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(_scores(net(leaf), target).sum(), leaf)
    finally:
        for hook in hooks:
            hook.remove()
    return slope


def _targets(output: Tensor, target: int | Tensor | None) -> Tensor:
    """int64 (N,)."""
    if output.dim() != 2:
        raise ValueError(f"net: expected one that gives (N, classes), got {tuple(output.shape)}")
    if target is None:
        return output.detach().argmax(1)
    targets = torch.as_tensor(target, device=output.device)
    if targets.dtype.is_floating_point or targets.shape not in ((), output.shape[:1]):
        raise ValueError(f"target: expected a class or one for each of {len(output)} images, got {target!r}")
    if targets.numel() and not (targets.min() >= 0 and targets.max() < output.shape[1]):
        raise ValueError(f"target: expected classes from 0 to {output.shape[1] - 1}, got {target!r}")
    return targets.long().expand(len(output))


def _scores(output: Tensor, target: int | Tensor | None) -> Tensor:
    """The output for each image's target, (N,)."""
    return output.gather(1, _targets(output, target)[:, None])[:, 0]


class ReceptiveField(NamedTuple):
    """What one place of a layer sees of an image: place i sees the pixels from ``start + i · step`` on, ``size`` of
    them, along either side. They may lie beyond the border, in the padding.
    """

    size: int
    step: int
    start: int


def receptive_field(net: nn.Module, layer: str) -> ReceptiveField | None:
    """That of a layer in ``net.features``; None where a place sees the whole image, or it is not known what: behind
    ``features``, and behind modules that the variants do not have.

    With kernels k, strides s and paddings p: size = 1 + Σ (k-1)·Π s and start = -Σ p·Π s, where Π is over the layers
    before.
    """
    name = find_layers(net, [layer])[layer]
    size, step, start = 1, 1, 0
    for place, module in net.features.named_children():
        match module:
            case nn.Conv2d() | nn.MaxPool2d() if not isinstance(module.padding, str):
                numbers = (module.kernel_size, module.stride, module.padding, module.dilation)
                kernel, stride, padding, dilation = (n if isinstance(n, int) else n[0] for n in numbers)
            case SpatialResponseNorm():
                kernel, stride, padding, dilation = module.size, 1, module.size // 2, 1
            case nn.ZeroPad2d():
                kernel, stride, padding, dilation = 1, 1, module.padding[0], 1
            case nn.ReLU() | nn.LocalResponseNorm() | nn.Dropout() | nn.Identity():
                kernel, stride, padding, dilation = 1, 1, 0, 1
            case _:
                return None
        start -= padding * step
        size += (kernel - 1) * dilation * step
        step *= stride
        if name == f"features.{place}":
            return ReceptiveField(size, step, start)
    return None


class Peaks(NamedTuple):
    """``values`` (N, C), of each image the largest output of each channel; ``boxes`` int64 (N, C, 4), the part of the
    image that the place of that output sees, as top, left, bottom, right in pixels within the image."""

    values: Tensor
    boxes: Tensor


@torch.no_grad()
def peaks(net: nn.Module, images: Tensor, layer: str) -> Peaks:
    """Where in each image each channel of ``layer`` answers most strongly: ``values.topk(9, 0)`` over many images are
    what shows what a channel looks for (Zeiler and Fergus 2014, arXiv 1311.2901, figure 2).

    Raises:
        ValueError: there is no such layer, with the nearest names.
    """
    output, field = features(net, layer)(images)[layer], receptive_field(net, layer)
    height, width = images.shape[2:]
    if output.dim() != 4 or field is None:
        whole = torch.tensor([0, 0, height, width], device=output.device)
        values = output.flatten(2).amax(2) if output.dim() > 2 else output
        return Peaks(values, whole.expand(*values.shape, 4))
    values, places = output.flatten(2).max(2)
    first = torch.stack([places // output.shape[3], places % output.shape[3]], 2) * field.step + field.start
    limits = torch.tensor([height, width], device=output.device)
    ends = [corner.clamp(min=0).minimum(limits) for corner in (first, first + field.size)]
    return Peaks(values, torch.cat(ends, 2))
