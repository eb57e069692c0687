"""What a trained net sees: the outputs of its layers, by the paper's names for them or by its modules' own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from alexnet_fast.terminal import nearest

# torch.nn's layers by the words of the paper and of Caffe. Normalizations of any kind are `norm`.
WORDS = {nn.Conv2d: "conv", nn.ReLU: "relu", nn.MaxPool2d: "pool", nn.Dropout: "drop", nn.Linear: "fc"}


def layer_names(net: nn.Module) -> dict[str, str]:
    """The paper's name of each layer of an AlexNet, and its module's, in the order of the modules: ``conv1`` is
    ``features.0``. A layer has the number of the last convolution or linear layer before it.

    Raises:
        ValueError: ``net`` has no ``features`` and ``classifier`` as AlexNet's.
    """
    parts = [getattr(net, name, None) for name in ("features", "classifier")]
    if not all(isinstance(part, nn.Sequential) for part in parts):
        raise ValueError(f"net: expected one with features and classifier, as AlexNet has, got {type(net).__name__}")
    names, number = {}, 0
    for top, part in zip(("features", "classifier"), parts, strict=True):
        children = list(part._modules.items())
        for (place, module), (_, after) in zip(children, [*children[1:], ("", None)], strict=True):
            if isinstance(module, nn.Linear) and module.bias is None and isinstance(after, nn.Linear):
                continue  # the first half of a layer of low rank
            number += isinstance(module, (nn.Conv2d, nn.Linear))
            word = next((word for kind, word in WORDS.items() if isinstance(module, kind)), None)
            if "Norm" in type(module).__name__:
                word = "norm"
            name = f"{word}{number}"
            if word == "drop" and top == "classifier" and isinstance(part[0], nn.Dropout):
                name = f"drop{number + 1}"  # torchvision's dropouts stand before the layers whose inputs they drop
            if word is not None and name not in names:
                names[name] = f"{top}.{place}"
        if top == "features" and hasattr(net, "avgpool"):
            names["avgpool"] = "avgpool"
    return names


def find_layers(net: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """The module of each of ``layers``, which are names of the paper or of modules.

    Raises:
        ValueError: there is no such layer; the message names the nearest.
    """
    names, modules = layer_names(net), {name for name, _ in net.named_modules() if name}
    found = {}
    for layer in layers:
        if layer not in names and layer not in modules:
            raise ValueError(
                f"layers: there is no layer {layer!r}{nearest(layer, [*names, *modules])}; known are {', '.join(names)}"
            )
        found[layer] = names.get(layer, layer)
    return found


def features(net: nn.Module, layers: str | Iterable[str]) -> FeatureExtractor:
    """``net`` as a function of images to the outputs of some of its layers::

        extract = features(net, ["conv1", "relu5", "fc7"])
        extract(images)["fc7"]  # (N, 4096)

    Args:
        net: an :class:`alexnet_fast.AlexNet`, or one with its ``features`` and ``classifier``, such as torchvision's.
        layers: names of the paper (``conv1``, ``relu1``, ``norm1``, ``pool1`` … ``conv5``, ``relu5``, ``pool5``,
            ``fc6``, ``relu6``, ``drop6`` … ``fc8``), of the pooling between (``avgpool``), or of modules, which
            torchvision takes for nodes (``features.0``, ``classifier.4``).

    Each is what its layer gives, before the layer after it: ``fc7`` before ReLU, ``relu7`` after it.

    Raises:
        ValueError: there is no such layer, with the nearest names; or the net is of another kind.
    """
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected a name or several, got {layers!r}")
    return FeatureExtractor(net, [layers] if isinstance(layers, str) else list(layers))


class _Enough(Exception):
    """All that was asked for has been seen: the rest of the net need not run."""


class FeatureExtractor(nn.Module):
    """See :func:`features`. ``net`` stays the module it was: shared, in its mode, with its hooks."""

    def __init__(self, net: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers: expected one name at least, got none")
        self.net, self.layers = net, find_layers(net, layers)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The layers' outputs of a batch, under the names they were asked by."""
        outputs: dict[str, Tensor] = {}
        hooks = []
        try:
            for module in dict.fromkeys(self.layers.values()):

                def keep(_module: nn.Module, _inputs: object, output: Tensor, name: str = module) -> None:
                    outputs[name] = output.clone() if self._overwritten(name) else output
                    if len(outputs) == len(hooks):
                        raise _Enough

                hooks.append(self.net.get_submodule(module).register_forward_hook(keep))
            self.net(images)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return {layer: outputs[module] for layer, module in self.layers.items()}

    def _overwritten(self, name: str) -> bool:
        """Whether the module after ``name`` works in place."""
        top, _, place = name.rpartition(".")
        after = dict(self.net.get_submodule(top)._modules) if top else {}
        places = list(after)
        following = places[places.index(place) + 1 :] if place in places else []
        return bool(following) and getattr(after[following[0]], "inplace", False)

    def extra_repr(self) -> str:
        return ", ".join(self.layers)


@torch.no_grad()
def fully_convolutional(net: nn.Module) -> nn.Sequential:
    """``net`` with its linear layers as convolutions (Caffe's net surgery): an image of any size gives a map of logits,
    (N, num_classes, rows, columns), each of them the net's logits of one window of ``variant.image_size`` pixels.

    Windows are as far apart as one step of the last pooling layer, 32 pixels in most variants. The result shares the
    convolutions' weights with ``net`` and has the linear layers' in memory of its own, those of
    int8 as the numbers that they stand for.

    Raises:
        ValueError: ``net`` is no AlexNet, or one whose linear layers are split over towers.
    """
    from alexnet_fast.models.alexnet import AlexNet
    from alexnet_fast.nn import FusedSequential, GroupedLinear, Int8Linear

    if not isinstance(net, AlexNet):
        raise ValueError(f"net: expected an AlexNet, got {type(net).__name__}")
    side = net.variant.feature_side(net.variant.image_size)
    layers = list(net.features)
    for module in net.classifier:
        if isinstance(module, GroupedLinear):
            raise ValueError(f"net: the linear layers of {net.variant.name!r} are split over towers")
        if isinstance(module, nn.Linear):
            channels = module.in_features // side**2
            convolution = nn.Conv2d(channels, module.out_features, side, bias=module.bias is not None)
            weight = module.float_weight() if isinstance(module, Int8Linear) else module.weight
            convolution.to(weight)
            convolution.weight.copy_(weight.view(convolution.weight.shape))
            if module.bias is not None:
                convolution.bias.copy_(module.bias)
            layers.append(convolution)
            side = 1
        else:
            layers.append(module)
    return FusedSequential(*layers).train(net.training)
