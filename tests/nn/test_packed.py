"""pack(): the same results from packed weights, new ones whenever a weight has changed, none where they may not be."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import ClassVar

import pytest
import torch
from torch import nn

from alexnet_fast import FusedSequential, backend, pack
from alexnet_fast.nn import GroupedLocalResponseNorm, packed

pytestmark = pytest.mark.skipif(not packed.onednn_runs(torch.float32), reason="this torch has no oneDNN")


def net() -> FusedSequential:
    torch.manual_seed(0)
    return FusedSequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.LocalResponseNorm(3, 0.1), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.ReLU(inplace=True)),
        *(nn.Flatten(), nn.Linear(8 * 6 * 6, 16), nn.ReLU(), nn.Linear(16, 5, bias=False)),
    )


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def expected(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    with backend("reference"), torch.enable_grad():  # neither of which a packed weight serves
        return copy.deepcopy(model)(image).detach()


def copies(model: nn.Module) -> list:
    return [packed._copies[id(module)] for module in model if id(module) in packed._copies]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_results(image, dtype, form):
    """Every run that starts with a weight, in both layouts: in bfloat16 within two roundings of the largest result."""
    if not packed.onednn_runs(dtype):
        pytest.skip("oneDNN has no bfloat16 on this processor")
    model = net().to(dtype).to(memory_format=form)
    image = image.to(dtype).contiguous(memory_format=form)
    truth = expected(model, image)
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype] * truth.abs().max()
    assert (pack(model)(image) - truth).abs().max() <= allowed
    assert len(copies(model)) == 4
    assert None not in copies(model)
    assert (model(image) - truth).abs().max() <= allowed  # from the copies that the first call made


@torch.no_grad()
def test_copies_are_kept_and_are_those_of_the_weights(image):
    model = pack(net())
    model(image)
    before = copies(model)
    model(image)
    assert all(a is b for a, b in zip(before, copies(model), strict=True))


CHANGES = {
    "in place": lambda model: [p.mul_(-2) for p in model.parameters()],
    "load_state_dict": lambda model: model.load_state_dict({k: 3 * v for k, v in model.state_dict().items()}),
    "data": lambda model: [setattr(p, "data", p.data * -1) for p in model.parameters()],
    "new parameters": lambda model: [
        setattr(m, "weight", nn.Parameter(-m.weight)) for m in model if hasattr(m, "weight")
    ],
    "new parameters, old memory": lambda model: [
        setattr(m, "weight", nn.Parameter(m.weight.detach().neg_())) for m in model if hasattr(m, "weight")
    ],
    "packed again": lambda model: ([p.data.neg_() for p in model.parameters()], pack(model)),
    "dtype": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_weights_count(image, change):
    model = pack(net())
    model(image)
    CHANGES[change](model)
    image = image.to(model[0].weight.dtype)
    torch.testing.assert_close(model(image), expected(model, image))


EDITS = {
    "padding": lambda model: setattr(model[0], "padding", (0, 2)),
    "stride": lambda model: setattr(model[0], "stride", (2, 1)),
    "dilation": lambda model: setattr(model[0], "dilation", (2, 2)),
    "no bias": lambda model: setattr(model[0], "bias", None),
    "bias": lambda model: setattr(model[0], "bias", nn.Parameter(-model[0].bias)),
    "size": lambda model: setattr(model[2], "size", 5),
    "k": lambda model: setattr(model[2], "k", 2.0),
    "grouped": lambda model: model.__setitem__(2, GroupedLocalResponseNorm(3, 0.1, groups=2)),
    "kernel_size": lambda model: setattr(model[3], "kernel_size", 3),
    "ceil_mode": lambda model: setattr(model[3], "ceil_mode", True),
    "hook": lambda model: model[1].register_forward_hook(lambda module, args, output: output + 1),
    "no pooling": lambda model: model.pop(3),
    "other activation": lambda model: model.__setitem__(1, nn.GELU()),
    "other norm": lambda model: model.__setitem__(2, nn.Identity()),
}


@pytest.mark.parametrize("edit", EDITS)
@torch.no_grad()
def test_edits_count(edit):
    image = torch.randn(2, 3, 15, 15)
    model = pack(net()[:4])
    model(image)
    EDITS[edit](model)
    truth = expected(model, image)
    torch.testing.assert_close(model(image), truth)
    torch.testing.assert_close(model(image), truth)  # from what the call before has kept


class Between(nn.Module):
    """A user's module: at first it hands on what came."""

    does = staticmethod(lambda x: x)

    def forward(self, x):
        return self.does(x)


class Watched(torch.Tensor):
    """Notes which functions take it."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@torch.no_grad()
def test_what_is_kept_is_for_plain_tensors_of_its_dtype(image):
    between = Between()
    model = pack(FusedSequential(between, nn.Conv2d(3, 4, 3), nn.ReLU()))
    truth = model(image)
    between.does = lambda x: x.as_subclass(Watched)
    torch.testing.assert_close(model(image).as_subclass(torch.Tensor), truth)
    assert any("conv" in name for name in Watched.seen)
    assert not any("packed" in name for name in Watched.seen)
    between.does = lambda x: x.double()
    with pytest.raises(TypeError, match=r"^weight: is torch.float32, but input is torch.float64$"):
        model(image)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(3, 6, 3)], ids=str)
@torch.no_grad()
def test_a_bias_with_strides(image, layer, packs):
    """oneDNN does not heed the strides of a bias."""
    layer.bias = nn.Parameter(torch.arange(12.0)[::2])
    model, x = FusedSequential(layer, nn.ReLU()), torch.ones(3, 4) if isinstance(layer, nn.Linear) else image
    model = pack(model) if packs else model
    for _ in range(2):
        torch.testing.assert_close(model(x), expected(model, x))


@torch.no_grad()
def test_rows_of_any_dimensions():
    model, x = pack(FusedSequential(nn.Linear(4, 5), nn.ReLU())), torch.ones(3, 4)
    for rows in (x, x[0], x[None], x[:0]):
        torch.testing.assert_close(model(rows), expected(model, rows))


@torch.no_grad()
def test_dropout_after_a_packed_layer():
    model, x = pack(FusedSequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(1.0))), torch.ones(3, 4)
    for _ in range(2):
        assert (model.train()(x) == 0).all()
        torch.testing.assert_close(model.eval()(x), expected(model, x))


@torch.no_grad()
def test_other_batches_and_image_sizes(image):
    """Convolutions' blocks are those for the shape; a linear layer has one copy for all."""
    model = pack(net())
    model(image)
    before = copies(model)
    for x in (image[:0], image.repeat(3, 1, 1, 1), image[:1]):
        torch.testing.assert_close(model(x), expected(model, x))
    assert [old is new for old, new in zip(before, copies(model), strict=True)] == [False, False, True, True]
    wide = torch.randn(2, 3, 16, 30)
    torch.testing.assert_close(model[:6](wide), expected(model[:6], wide))


def test_inference_mode(image):
    """Weights made outside are packed; those made inside count no versions, and are not."""
    model = pack(net())
    with torch.inference_mode():
        model(image)
        inside = pack(net())
        torch.testing.assert_close(inside(image), model(image))
    assert None not in copies(model)
    assert copies(inside) == [None] * 4


@torch.no_grad()
def test_nan_survives(image):
    """oneDNN's own ReLU would turn it into 0."""
    model = pack(net())
    image[0] = torch.nan
    assert model(image)[0].isnan().all()


def test_gradients_take_no_copies(image):
    model = pack(net())
    model(image).sum().backward()
    assert model[0].weight.grad is not None
    assert copies(model) == [None] * 4


@torch.no_grad()
def test_the_named_backend_and_autocast_rule(image):
    model = pack(net())
    with backend("reference"):
        model(image)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(image).dtype == torch.bfloat16
    assert copies(model) == [None] * 4


@torch.no_grad()
def test_modules_stay_as_they_are(image):
    model = pack(net())
    model(image)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copies(other) == []
        torch.testing.assert_close(other(image), model(image))


@torch.no_grad()
def test_copies_go_with_their_modules(image):
    """Copies are found by id, which a later module may have again."""
    model = pack(net())
    model(image)
    ids = {id(module) for module in model}
    assert ids & packed._copies.keys()
    del model
    gc.collect()
    assert not ids & packed._copies.keys()


@pytest.mark.parametrize("module", [nn.MaxPool2d(16), nn.MaxPool2d(3, 2)], ids=str)
@torch.no_grad()
def test_windows(image, module):
    """Of more than 255 elements only the reference has them."""
    model = pack(FusedSequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), module))
    torch.testing.assert_close(model(image), expected(model, image))


@torch.no_grad()
def test_refused_images(image):
    """The error is told in the operators' words, not in oneDNN's."""
    model = pack(net())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^weight: .* input has 6"):
            model(image.repeat(1, 2, 1, 1))
        with pytest.raises(ValueError, match=r"larger than the input's side"):
            model[4:](image[:, :1, :2].repeat(1, 8, 1, 1))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(image[..., :8])
        model(image)


def test_wrong_argument():
    with pytest.raises(TypeError, match=r"^model: expected an nn.Module, got int$"):
        pack(3)
