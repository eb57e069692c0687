"""Compares alexnet_fast.explain with the packages grad-cam and captum: for an environment that has them.

python -m tests.models.check_explain
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import GuidedBackprop, LayerGradCam, Occlusion
from pytorch_grad_cam import GradCAM, GuidedBackpropReLUModel
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor

from alexnet_fast import AlexNet, explain
from alexnet_fast.models.features import find_layers
from alexnet_fast.train.model import kaiming


def differs(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def scaled(maps: Tensor) -> Tensor:
    """0 … 1 in each image, as grad-cam gives its maps."""
    least = maps.amin((1, 2), keepdim=True)
    return (maps - least) / (maps.amax((1, 2), keepdim=True) - least + 1e-7)


def main() -> None:
    torch.manual_seed(0)
    for variant in ("torchvision", "paper"):
        net = AlexNet(7, variant=variant).eval()
        kaiming(net)
        side = net.variant.image_size
        images, targets = torch.randn(2, 3, side, side), torch.tensor([3, 5])
        layer = net.get_submodule(find_layers(net, ["relu5"])["relu5"])
        ours = explain.grad_cam(net, images, targets)
        results = {
            "Grad-CAM, captum": differs(
                ours, LayerGradCam(net, layer).attribute(images, targets, relu_attributions=True)[:, 0]
            )
        }
        with GradCAM(net, [layer]) as cam:
            theirs = cam(images, [ClassifierOutputTarget(int(target)) for target in targets])
        wide = F.interpolate(ours[:, None], (side, side), mode="bilinear")[:, 0]
        results["Grad-CAM, grad-cam"] = differs(scaled(wide), torch.from_numpy(theirs))
        ours = explain.guided_gradients(net, images, targets)
        results["guided, captum"] = differs(ours, GuidedBackprop(net).attribute(images, targets))
        theirs = GuidedBackpropReLUModel(net, "cpu")(images[:1], target_category=int(targets[0]))
        results["guided, grad-cam"] = differs(ours[0], torch.from_numpy(np.asarray(theirs)).permute(2, 0, 1))
        window, stride = 60, 45
        options = {"sliding_window_shapes": (3, window, window), "strides": (3, stride, stride)}
        theirs = Occlusion(net).attribute(images, target=targets, **options)[:, 0]
        ours = explain.occlusion(net, images, targets, window=window, stride=stride)
        results["occlusion, captum"] = differs(ours, theirs)
        for name, difference in results.items():
            print(variant, name, f"{difference:.2g}")
            assert difference < 1e-4, name


if __name__ == "__main__":
    main()
