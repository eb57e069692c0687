"""FusedSequential computes what nn.Sequential computes, by fewer operators, whatever is done to its modules."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

from alexnet_fast import FusedSequential, backend, fuse
from alexnet_fast.nn import GroupedLocalResponseNorm, SpatialResponseNorm


def convolution(inputs: int = 6, outputs: int = 6, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def stages() -> list[nn.Module]:
    """Each kind of run, and modules between them."""
    return [
        *(convolution(3), nn.ReLU(inplace=True), nn.LocalResponseNorm(5, 0.1, 0.75, 2.0), nn.MaxPool2d(3, 2)),
        *(convolution(groups=2), nn.ReLU(), GroupedLocalResponseNorm(3, 0.2, k=2.0, groups=2), nn.Dropout(0.0)),
        *(convolution(bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.LocalResponseNorm(4, 0.3)),
        *(convolution(), nn.ReLU(), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2, ceil_mode=True)),
        *(convolution(), nn.LocalResponseNorm(5, 0.1), SpatialResponseNorm(3, 0.1)),
    ]


STAGES = ["conv_stage", "conv_stage", "conv_stage", "lrn", "conv_relu", "max_pool", "lrn"]


@pytest.fixture
def pair() -> tuple[nn.Sequential, FusedSequential]:
    """A plain and a fused net of the same weights in float64; apart, so that hooks and in-place ReLUs do not mix."""
    torch.manual_seed(0)
    plain = nn.Sequential(*stages()).double()
    fused = FusedSequential(*stages()).double()
    fused.load_state_dict(plain.state_dict())
    return plain, fused


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 23, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_agree(plain: nn.Module, fused: nn.Module, image: torch.Tensor, **tolerance) -> None:
    """The same output, and the same gradients of a random projection of it."""
    results = []
    for net in (plain, fused):
        x = image.clone().requires_grad_()
        y = net(x + 0)  # an in-place ReLU in front may not write to a leaf
        net.zero_grad()
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append([y, x.grad, *[p.grad for p in net.parameters()]])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


# ---------------------------------------------------------------------------------------------------------- the same


def test_fuses_every_run(pair, image, operators):
    assert operators(pair[1], image) == STAGES


@pytest.mark.parametrize("name", ["reference", "cpu", "auto"])
def test_agrees(pair, image, name):
    with backend(name):
        assert_agree(*pair, image)


def test_agrees_in_float32(pair, image):
    """A wider tolerance: the gradient of a bias before a BatchNorm is zero, so only rounding errors are left of it."""
    assert_agree(pair[0].float(), pair[1].float(), image.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", range(len(stages()) + 1))
def test_slices(pair, image, k):
    plain, fused = pair
    head, tail = fused[:k], fused[k:]
    assert type(head) is type(tail) is FusedSequential
    with torch.no_grad():
        middle = plain[:k](image)
        torch.testing.assert_close(head(image), middle)
        torch.testing.assert_close(tail(middle.clone()), plain[k:](middle.clone()))


HOOKS = {
    "forward": lambda module, note: module.register_forward_hook(lambda m, i, o: note(i[0], o)),
    "forward_pre": lambda module, note: module.register_forward_pre_hook(lambda m, i: note(i[0])),
    "backward": lambda module, note: module.register_full_backward_hook(lambda m, i, o: note(*i, *o)),
    "backward_pre": lambda module, note: module.register_full_backward_pre_hook(lambda m, o: note(*o)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("index", range(len(stages())))
def test_hooks_see_true_values(image, index, kind, operators):
    torch.manual_seed(0)
    plain, fused = nn.Sequential(*stages()).double(), FusedSequential(*stages()).double()
    fused.load_state_dict(plain.state_dict())
    for net in (plain, fused):
        for module in net:  # full backward hooks refuse views that are changed in place
            module.inplace = False
    seen: list[list[torch.Tensor]] = [[], []]
    for net, record in zip((plain, fused), seen, strict=True):
        HOOKS[kind](
            net[index], lambda *tensors, record=record: record.extend(t.clone() for t in tensors if t is not None)
        )
    assert_agree(plain, fused, image)
    assert seen[0]
    for expected, got in zip(*seen, strict=True):
        torch.testing.assert_close(got, expected)
    assert "conv_stage" in operators(fused, image), "the runs without a hook stay fused"


def test_hook_that_changes_the_output(pair, image):
    for net in pair:
        net[0].register_forward_hook(lambda module, args, output: -output)
    assert_agree(*pair, image)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_called_in_training_alone(training):
    net, x = FusedSequential(nn.Dropout(), nn.Linear(4, 4), nn.Dropout()).train(training), torch.ones(2, 4)
    called = 0

    def entered(frame, event, _argument) -> None:
        nonlocal called
        called += event == "call" and frame.f_code is nn.Dropout.forward.__code__

    sys.setprofile(entered)
    try:
        net(x)
    finally:
        sys.setprofile(None)
    assert called == 2 * training


def test_removed_hook_fuses_again(pair, image, operators):
    handle = pair[1][1].register_forward_hook(lambda *_: None)
    assert operators(pair[1], image) == ["lrn", "max_pool", *STAGES[1:]]
    handle.remove()
    assert operators(pair[1], image) == STAGES


def test_global_hook_sees_every_module(pair, image, operators):
    seen = []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        assert operators(pair[1], image) == ["lrn"], "only the module that calls the operator itself"
    finally:
        handle.remove()
    assert seen == [*pair[1], pair[1]]


# ------------------------------------------------------------------------------------------------- run as they are


class Shifted(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


def replaced_forward() -> nn.Conv2d:
    module = convolution(3)
    module.forward = lambda x: nn.functional.conv2d(x, module.weight, module.bias, padding=1) + 1
    return module


UNFUSED = {
    "subclass": lambda: Shifted(3, 6, 3),
    "replaced forward": replaced_forward,
    "reflected border": lambda: convolution(3, padding_mode="reflect"),
    "weight_norm": lambda: parametrizations.weight_norm(convolution(3)),
    "old weight_norm": lambda: torch.nn.utils.weight_norm(convolution(3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(convolution(3)).eval(),
    "pruned": lambda: prune.l1_unstructured(convolution(3), "weight", 0.5),
    "transposed": lambda: nn.ConvTranspose2d(3, 6, 3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", UNFUSED)
def test_convolutions_that_are_called(image, name, operators):
    torch.manual_seed(0)
    first = UNFUSED[name]().double()
    fused = FusedSequential(first, nn.ReLU(), nn.MaxPool2d(3, 2))
    assert operators(fused, image) == ["max_pool"]
    assert_agree(nn.Sequential(*fused), fused, image)


def test_removed_parametrization_fuses(image, operators):
    net = FusedSequential(parametrizations.weight_norm(convolution(3)).double(), nn.ReLU())
    assert operators(net, image) == []
    parametrize.remove_parametrizations(net[0], "weight")
    assert operators(net, image) == ["conv_relu"]


def test_lazy_convolution_fuses_once_it_has_weights(image, operators):
    net = FusedSequential(nn.LazyConv2d(6, 3), nn.ReLU()).double()
    assert operators(net, image) == []
    assert operators(net, image) == ["conv_relu"]


def test_pool_options_that_are_called(image, operators):
    for pool in (nn.MaxPool2d(3, 1, dilation=2), nn.MaxPool2d(3, 2, return_indices=True)):
        net = FusedSequential(convolution(3), nn.ReLU(), pool).double()
        assert operators(net, image) == ["conv_relu"]
        torch.testing.assert_close(net(image), nn.Sequential(*net)(image))


def test_other_tensors_take_the_modules():
    net, pool = FusedSequential(nn.MaxPool2d(2)), nn.MaxPool2d(2)
    integers = torch.arange(36).view(1, 1, 6, 6)
    assert torch.equal(net(integers), pool(integers))
    opaque = integers.float().to_mkldnn()  # oneDNN's own layout
    assert torch.equal(net(opaque).to_dense(), pool(opaque).to_dense())


def test_tensors_that_wrap_others_take_the_modules(image, operators):
    """Tensors such as DTensor, for which these operators have no sharding rules."""
    net = FusedSequential(convolution(3), nn.ReLU(), nn.MaxPool2d(2)).double()
    assert operators(net, TwoTensor(image, -image)) == []
    torch.testing.assert_close(net(TwoTensor(image, -image)).b, net(-image))
    weight = net[0].weight.detach()
    net[0].weight = nn.Parameter(TwoTensor(weight, -weight))
    assert operators(net[:2], image) == []


def test_unbatched_images(image, operators):
    """Of three dimensions nn.LocalResponseNorm takes the middle one for channels."""
    layers = [convolution(3), nn.ReLU(), nn.LocalResponseNorm(3, 10.0), nn.MaxPool2d(2)]
    net = FusedSequential(*layers).double()
    torch.testing.assert_close(net(image[0]), nn.Sequential(*layers)(image[0]))
    assert operators(net[:2], image[0]) == ["conv_relu"]


# ---------------------------------------------------------------------------------------- edited between two calls

EDITS = {
    "setitem": (lambda net: net.__setitem__(1, nn.Tanh()), ["lrn", "max_pool", *STAGES[1:]]),
    "setitem subclass": (lambda net: net.__setitem__(4, Shifted(6, 6, 3, padding=1)), [STAGES[0], "lrn", *STAGES[2:]]),
    "append": (lambda net: net.append(nn.MaxPool2d(2)), [*STAGES, "max_pool"]),
    "insert": (lambda net: net.insert(2, nn.Tanh()), ["conv_relu", "lrn", "max_pool", *STAGES[1:]]),
    "extend": (lambda net: net.extend([convolution(), nn.ReLU()]), [*STAGES, "conv_relu"]),
    "delete": (lambda net: net.__delitem__(13), [*STAGES[:4], "max_pool", "lrn"]),
    "pool stride": (lambda net: setattr(net[3], "stride", 3), STAGES),
    "pool window": (lambda net: setattr(net[3], "kernel_size", (2, 3)), STAGES),
    "pool dilation": (lambda net: setattr(net[3], "dilation", 2), STAGES),
    "lrn": (lambda net: setattr(net[2], "k", 0.5), STAGES),
    "conv padding": (lambda net: setattr(net[0], "padding", (2, 0)), STAGES),
    "conv without bias": (lambda net: net[0].register_parameter("bias", None), STAGES),
    "conv border": (lambda net: circular(net[0]), ["lrn", "max_pool", *STAGES[1:]]),
    "new weight": (lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.detach() * 2)), STAGES),
}


def circular(module: nn.Conv2d) -> None:
    module.padding_mode, module._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]


@pytest.mark.parametrize("name", EDITS)
def test_edits_take_effect(pair, image, name, operators):
    edit, expected = EDITS[name]
    plain, fused = pair
    fused(image)
    for net in pair:
        torch.manual_seed(3)
        edit(net)
        net.double()
    assert_agree(plain, fused, image)
    assert operators(fused, image) == expected


# ---------------------------------------------------------------------------------------------------- it composes


def test_keys_and_repr(pair):
    plain, fused = pair
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert repr(fused) == repr(plain)


def test_copies_and_pickles(pair, image, operators):
    _, fused = pair
    fused(image)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert operators(other, image) == STAGES
        torch.testing.assert_close(other(image), fused(image))


def test_frozen_modules_get_no_gradient(pair, image):
    for net in pair:
        net[:8].requires_grad_(False)
        net(image).sum().backward()
        assert all((p.grad is None) == (not p.requires_grad) for p in net.parameters())
    for expected, got in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(dtype):
    """Against the net in float32: torch has no LRN for these on CPUs."""
    torch.manual_seed(0)
    net = FusedSequential(*stages())
    x = torch.randn(2, 3, 23, 21)
    expected = nn.Sequential(*copy.deepcopy(net))(x)
    got = net.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.05)


def test_channels_last(pair, image):
    plain, fused = pair
    fused = fused.to(memory_format=torch.channels_last)
    got = fused(image.contiguous(memory_format=torch.channels_last))
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, plain(image), check_stride=False)


def test_autocast():
    torch.manual_seed(0)
    layers = [convolution(3), nn.ReLU(), nn.MaxPool2d(3, 2), convolution(), nn.ReLU()]
    plain, fused = nn.Sequential(*layers), FusedSequential(*layers)
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = plain(x), fused(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)
    got.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in fused.parameters())


def test_function_transforms(image):
    """Gradients of single images, and derivatives along a direction, both by torch's own rules."""
    net = FusedSequential(*stages()[:6]).double()
    plain, parameters = nn.Sequential(*net), dict(net.named_parameters())
    per_image, along = [], []
    for model in (plain, net):

        def loss(parameters, x, model=model):
            return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

        per_image.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, image))
        along.append(torch.func.jvp(model, (image,), (image.cos(),))[1])
    torch.testing.assert_close(*per_image)
    torch.testing.assert_close(*along)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(image, image.cos())
        torch.testing.assert_close(forward_ad.unpack_dual(net(dual)).tangent, along[0])


def test_data_parallel_training(pair, image):
    plain, fused = pair
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert_agree(plain, nn.parallel.DistributedDataParallel(fused), image)
    finally:
        torch.distributed.destroy_process_group()


def test_empty_batch(pair, image):
    assert pair[1].eval()(image[:0]).shape == pair[0].eval()(image[:0]).shape


def test_compiles_to_one_graph(pair, image):
    plain, fused = pair
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), plain(image))
    fused[3].stride = plain[3].stride = 3  # a guard on what the graph read, so it is traced again
    torch.testing.assert_close(compiled(image), plain(image))


def test_traces_with_fx(pair, image):
    """As torchvision's feature extraction does: every module a node of its own."""
    graph = torch.fx.symbolic_trace(pair[1])
    assert len(graph.graph.nodes) == 1 + len(pair[1]) + 1
    torch.testing.assert_close(graph(image), pair[0](image))


# ---- Layers whose behaviour was changed ------------------------------------------------------------------------------


class Watched(TorchFunctionMode):
    """Counts the functions that it sees, and gives convolutions another result."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is torch.conv2d else result


CHANGED = [
    (nn.ReLU, "forward", lambda self, x: x + 1),
    (nn.Conv2d, "forward", lambda self, x: self._conv_forward(x, 2 * self.weight, self.bias)),
    (nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: F.conv2d(x, weight, bias) + 1),
    (nn.MaxPool2d, "forward", lambda self, x: x[..., ::2, ::2]),
    (nn.LocalResponseNorm, "forward", lambda self, x: x - 1),
    (nn.Linear, "forward", lambda self, x: x @ self.weight.t()),
    (F, "conv2d", lambda x, *rest: torch.conv2d(x, *rest) + 1),
    (F, "relu", lambda x, inplace=False: x.sigmoid()),
    (F, "max_pool2d", lambda x, *args, **options: x[..., ::2, ::2]),
    (F, "linear", lambda x, weight, bias: x @ weight.t()),
    (nn.Module, "__call__", lambda self, *args: self.forward(*args) + 1),
]


@pytest.mark.parametrize(("owner", "name", "other"), CHANGED, ids=[f"{o.__name__}.{n}" for o, n, _ in CHANGED])
@pytest.mark.parametrize("gradients", [False, True])
def test_what_was_changed_is_called(owner, name, other, gradients, monkeypatch):
    """However a module is changed, the result is that of nn.Sequential."""
    plain = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(2, 2), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, 4), nn.ReLU()),
    )
    net, x = fuse(copy.deepcopy(plain)), torch.randn(2, 3, 10, 10)
    with torch.set_grad_enabled(gradients):
        before = net(x)
        monkeypatch.setattr(owner, name, other)
        changed, expected = net(x), plain(x)
        monkeypatch.undo()
        again = net(x)
    torch.testing.assert_close(changed, expected)
    assert not torch.allclose(before, changed)
    torch.testing.assert_close(again, before)


def test_a_torch_function_mode_sees_what_it_would_see(operators):
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    net, x = fuse(copy.deepcopy(plain)), torch.randn(2, 3, 10, 10)
    results, seen = [], []
    for each in (net, plain):
        with Watched() as mode:
            results.append(each(x))
        seen.append([function for function in mode.seen if function in (torch.conv2d, F.relu)])
    torch.testing.assert_close(*results)
    assert seen[0] == seen[1] != []
    with torch.device("cpu"):  # also such a mode, but it only places new tensors
        assert operators(net, x) == ["conv_stage"]


def test_torchscript_of_fused_nets():
    """trace and script of what is fused are those of nn.Sequential."""
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(2), nn.Dropout())
    net, x = fuse(copy.deepcopy(plain)).eval(), torch.randn(2, 3, 10, 10)
    other = torch.randn(1, 3, 12, 9)
    for made in (torch.jit.trace(net, x), torch.jit.script(net)):
        torch.testing.assert_close(made(other), plain.eval()(other))
    grads = [torch.autograd.grad(each(other.requires_grad_()).sum(), other)[0] for each in (made, plain)]
    torch.testing.assert_close(*grads)
    assert "alexnet_fast" not in str(torch.jit.trace(net, x).inlined_graph).replace("__torch__.alexnet_fast", "")
