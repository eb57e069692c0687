"""What test_ecosystem.py runs in an environment with torchvision and torchao: python -m tests.ecosystem."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torchvision
from PIL import Image
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
from torchvision import models

import alexnet_fast
from alexnet_fast.models import AlexNet_Weights, alexnet


def registered() -> None:
    for build in ("alexnet_fast", "alexnet_fast_paper", alexnet.alexnet):
        assert models.get_model_weights(build) is models.AlexNet_Weights
    assert models.get_model("alexnet_fast_paper", num_classes=3).variant.name == "paper"


def weights() -> None:
    ours, theirs = AlexNet_Weights.DEFAULT, models.AlexNet_Weights.DEFAULT
    assert (repr(ours), ours.url) == (repr(theirs), theirs.url)
    for name in ("categories", "num_params", "min_size", "recipe", "_metrics"):
        assert ours.meta[name] == theirs.meta[name], name
    generator = np.random.default_rng(0)
    for shape in ((300, 417), (417, 300), (256, 256), (100, 90)):
        picture = Image.fromarray(generator.integers(0, 256, (*shape, 3), np.uint8))
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        for x in (picture, image, image / 255, image[None]):
            assert torch.equal(ours.transforms()(x), theirs.transforms()(x)), shape


def int8(net: torch.nn.Module) -> tuple[torch.fx.GraphModule, int]:
    """PT2E's int8 program of ``net``, and how many nodes quantize."""
    x = torch.randn(1, 3, 224, 224)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(net, (x,)).module(), quantizer)
    prepared(x)
    made = convert_pt2e(prepared)
    return made, sum("quantize" in str(node.target) for node in made.graph.nodes)


def quantized() -> None:
    plain = models.AlexNet(5).eval()
    ours = alexnet_fast.AlexNet(5).eval()
    ours.load_state_dict(plain.state_dict())
    fused = alexnet_fast.fuse(copy.deepcopy(plain))
    assert repr(ours) == repr(fused) == repr(plain)
    torch.manual_seed(0)
    expected, nodes = int8(plain)
    x = torch.randn(1, 3, 224, 224)
    for net in (ours, fused):
        torch.manual_seed(0)
        made, found = int8(net)
        assert found == nodes > 20
        torch.testing.assert_close(made(x), expected(x))


if __name__ == "__main__":
    registered()
    weights()
    quantized()
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
