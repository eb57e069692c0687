"""A succession of fused layers is one call into C++, planned once, and never by a plan that no longer holds."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from alexnet_fast import _C, FusedSequential, backend, fuse, pack
from alexnet_fast.nn import GroupedLocalResponseNorm, packed, runs
from alexnet_fast.ops import run
from benchmarks.memory import peak_bytes
from tests.ops.calls import Calls
from tests.ops.compare import saved_bytes

Is = _C.Is


def layers() -> list[nn.Module]:
    """Every kind of layer that a run carries out."""
    return [
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.LocalResponseNorm(3, 0.1), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), GroupedLocalResponseNorm(3, 0.2, groups=2), nn.MaxPool2d(3, 1)),
        *(nn.LocalResponseNorm(3, 0.1), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 5)),
    ]


def pair() -> tuple[nn.Sequential, FusedSequential]:
    torch.manual_seed(0)
    plain = nn.Sequential(*layers()).eval()
    return plain, fuse(copy.deepcopy(plain))


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Gets an element for each run that C++ carries out."""
    made = []
    carry_out = runs.Run.carry_out

    def counted(planned, x):
        y = carry_out(planned, x)
        made.append(y is not None)
        return y

    monkeypatch.setattr(runs.Run, "carry_out", counted)
    return made


def gradients(net: nn.Module, x: torch.Tensor, call=None) -> list[torch.Tensor]:
    wanted = [t for t in [x, *net.parameters()] if t.requires_grad]
    return list(torch.autograd.grad((call or net)(x).square().sum(), wanted))


# ------------------------------------------------------------------------------------------------------ what is made


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference_is_one_call(image, calls, mode):
    plain, fused = pair()
    with mode():
        torch.testing.assert_close(fused(image), plain(image))
    assert calls == [True]


def test_training_is_one_call_and_one_node(image, calls):
    plain, fused = pair()
    x = image.requires_grad_()
    y = fused(x)
    assert calls == [True]
    nodes = {type(node).__name__ for node, _ in y.grad_fn.next_functions if node}
    assert nodes == {"AccumulateGrad"}
    for got, expected in zip(gradients(fused, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1, 4, 7, 14, 18, 21])
@pytest.mark.parametrize("wants_image", [False, True])
def test_gradients_and_saved_memory_with_frozen_layers(image, frozen, wants_image):
    """Gradients as without a plan, and no tensor kept that was not kept then."""
    _, fused = pair()
    fused[:frozen].requires_grad_(False)
    x = image.requires_grad_(wants_image)
    if not wants_image and frozen == len(fused):
        assert not fused(x).requires_grad
        return
    planned, bytes_planned = gradients(fused, x), saved_bytes(lambda: fused(x))
    one_by_one = gradients(fused, x, fused._as_it_is)
    bytes_one_by_one = saved_bytes(lambda: fused._as_it_is(x))
    for got, expected in zip(planned, one_by_one, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert bytes_planned <= bytes_one_by_one


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_layouts(image, dtype, calls):
    plain, fused = pair()
    for form in (torch.contiguous_format, torch.channels_last):
        net = fused.to(dtype).to(memory_format=form)
        x = image.to(dtype).contiguous(memory_format=form)
        expected, tolerance = plain.double()(image.double()), 1e-9 if dtype == torch.float64 else 0.05
        torch.testing.assert_close(net(x).double(), expected, rtol=tolerance, atol=tolerance)
        got = gradients(net, x)
        for grad, parameter in zip(got, net.parameters(), strict=True):
            assert grad.dtype == dtype
            assert grad.shape == parameter.shape
    assert calls == [True] * 4


def test_parameters_that_are_views_of_one_buffer(image, calls):
    """As where parameters are flattened: each begins past its memory's start, and is read from there."""
    plain, fused = pair()
    flat = torch.cat([parameter.detach().flatten() for parameter in fused.parameters()])
    parts = flat.split([parameter.numel() for parameter in fused.parameters()])
    for parameter, part in zip(fused.parameters(), parts, strict=True):
        parameter.data = part.view(parameter.shape)
    torch.testing.assert_close(gradients(fused, image), gradients(plain, image))
    with torch.inference_mode():
        torch.testing.assert_close(fused(image), plain(image))
    assert calls == [True, True]


@pytest.mark.parametrize("start", [0, 3, 4, 11, 12])
@pytest.mark.parametrize("frozen", [0, 1, 5, 12, 16, 21])
@pytest.mark.parametrize("wants_image", [True, False])
def test_second_derivatives(start, frozen, wants_image, calls):
    """Of nets that begin with each kind of layer and learn from each layer on: by the input, the parameters, and the
    gradient that comes in, as of modules one by one."""
    made = pair()
    shapes = {0: (2, 3, 16, 16), 3: (2, 8, 16, 16), 4: (2, 8, 7, 7), 11: (2, 6, 1, 1), 12: (2, 6, 1, 1)}
    image, results = torch.randn(shapes[start], dtype=torch.float64), []
    for net in made:
        net = net[start:].double()
        net[: max(0, frozen - start)].requires_grad_(False)
        x = image.clone().requires_grad_(wants_image)
        y = net(x)
        leaves = [t for t in [x, *net.parameters()] if t.requires_grad]
        if not leaves:
            return
        dy = torch.full_like(y, 0.5, requires_grad=True)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        penalty = sum(grad.pow(3).sum() for grad in first)
        seconds = torch.autograd.grad(penalty, [dy, *leaves], create_graph=True, allow_unused=True)
        # torch says None where a gradient is zero by construction, and this package may say so elsewhere.
        results.append([grad if grad is None else grad.detach() for grad in (*first, *seconds)])
    assert calls == [True]
    for plain, fused in zip(*results, strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(*torch.broadcast_tensors(*(zero if g is None else g for g in (fused, plain))))


def test_retained_graphs_and_checkpoints(image):
    _, fused = pair()
    x = image.requires_grad_()
    y = fused(x).sum()
    first, again = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    recomputed = torch.autograd.grad(checkpoint(fused, x, use_reentrant=False).sum(), x)[0]
    assert torch.equal(first, again)
    torch.testing.assert_close(recomputed, first)


def test_a_weight_that_changes_before_backward_is_noticed(image):
    _, fused = pair()
    y = fused(image).sum()
    with torch.no_grad():
        fused[4].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_result_that_changes_before_backward_is_noticed(image):
    """The ReLU's output is its mask: where it is the run's result, the caller has it."""
    fused = FusedSequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    y = fused(image)
    y.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_tensors_that_are_kept_pass_hooks_where_there_are_any(image):
    _, fused = pair()
    expected = gradients(fused, image)
    passed = []

    def copied(x: torch.Tensor) -> torch.Tensor:
        passed.append(x)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(copied, lambda x: x):
        y = fused(image)
    got = torch.autograd.grad(y.square().sum(), list(fused.parameters()))
    assert len(passed) > len(list(fused.parameters()))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_kept_goes_layer_by_layer():
    """At its peak, backward of one node takes no more memory than nn.Sequential's, of a node a layer."""
    channels = 4, 16, 16, 4, 4, 4, 4  # four layers of a quarter's size, all of which are done when the peak comes
    stages = [(nn.Conv2d(*sides, 3, padding=1), nn.ReLU()) for sides in pairwise(channels)]
    fused = FusedSequential(*(module for stage in stages for module in stage), nn.MaxPool2d(2))
    x = torch.randn(1, 4, 64, 64)
    planned, plain = (
        peak_bytes(lambda net=net: net(x).sum().backward(), "cpu") for net in (fused, nn.Sequential(*fused))
    )
    assert planned <= plain + x.nbytes  # a quarter of the largest


def test_what_is_kept_goes_with_the_graph(image):
    _, fused = pair()
    y = fused(image)
    node, (native,) = y.grad_fn, fused._plan.parts[0].natives.values()
    number = next(part.number for part in node.call if isinstance(part, _C.Kept))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    backward = run.RUN_BACKWARD, (torch.ones_like(y), image, [], [], native.number, 2)
    for held in (0, number):  # nothing is there any more
        with pytest.raises(RuntimeError, match="these are not the tensors that were kept"):
            backward[0](*backward[1], held, False)
    del y, node
    with pytest.raises(RuntimeError, match=f"nothing is kept under {number}"):
        backward[0](*backward[1], number, False)


def test_gradients_become_the_parameters_own(image, monkeypatch):
    """Not copies: an accumulated gradient is the memory that backward wrote."""
    _, fused = pair()
    written: list[int] = []
    backward = run.RUN_BACKWARD

    def watched(*args):
        found = backward(*args)
        written.extend(grad.data_ptr() for grad in found)
        return found

    monkeypatch.setattr(run, "RUN_BACKWARD", watched)
    fused(image).sum().backward()
    assert {p.grad.data_ptr() for p in fused.parameters()} <= set(written)


# -------------------------------------------------------------------------------------------------- what changes a plan


def replace_weight(net) -> None:
    net[0].weight = nn.Parameter(-net[0].weight.detach())


CHANGES = {
    "option": lambda net: setattr(net[0], "padding", (2, 0)),
    "hook": lambda net: net[1].register_forward_hook(lambda module, args, output: output + 1),
    "hook before": lambda net: net[0].register_forward_pre_hook(lambda module, args: args[0] + 1),
    "other module": lambda net: net.__setitem__(1, nn.Tanh()),
    "one less": lambda net: net.__delitem__(3),
    "forward of the module": lambda net: setattr(net[3], "forward", lambda x: -x[..., ::2, ::2]),
    "class of the module": lambda net: setattr(net[1], "__class__", nn.Sigmoid),
    "weight": replace_weight,
    "weight in place": lambda net: net[0].weight.data.mul_(-2),
    "data": lambda net: setattr(net[0].weight, "data", -net[0].weight.data),
    "data of another shape": lambda net: setattr(net[0].weight, "data", torch.ones(8, 3, 1, 1)),
    "layout": lambda net: net.to(memory_format=torch.channels_last),
    "no bias": lambda net: setattr(net[0], "bias", None),
    "parametrized": lambda net: nn.utils.parametrize.register_parametrization(net[0], "weight", nn.Tanh(), unsafe=True),
    "dictionary of parameters": lambda net: setattr(
        net[0], "_parameters", {name: nn.Parameter(-p) for name, p in net[0]._parameters.items()}
    ),
}


@pytest.mark.parametrize("gradients_too", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_first_call_counts(image, change, gradients_too):
    torch.manual_seed(0)
    plain = nn.Sequential(*layers()[:4])
    fused = fuse(copy.deepcopy(plain))
    with torch.set_grad_enabled(gradients_too):
        before = fused(image)
        for net in (plain, fused):
            torch.manual_seed(0)
            CHANGES[change](net)
        with backend("reference"):
            expected = plain(image)
        for _ in range(2):
            torch.testing.assert_close(fused(image), expected)
    if change != "layout":
        assert before.shape != expected.shape or not torch.allclose(before, expected)


def test_a_list_that_changes_is_no_option_to_plan_with(image):
    fused = FusedSequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d([2, 2], [2, 2]))
    fused(image)
    fused[2].stride[0] = 1
    torch.testing.assert_close(fused(image), nn.Sequential(*fused)(image))


def test_dtype_in_place(image):
    plain, fused = pair()
    fused(image)
    torch.testing.assert_close(fused.double()(image.double()), plain.double()(image.double()))
    with pytest.raises(TypeError, match=r"weight: is torch\.float64, but input is torch\.float32"):
        fused(image)


def test_dropout_counts_as_training_says(image):
    _, fused = pair()
    still = fused(image)
    assert not torch.equal(fused.train()(image), fused(image))
    assert torch.equal(fused.eval()(image), still)


def test_another_backend_is_another_run(image, calls):
    _, fused = pair()
    expected = fused(image)
    with backend("reference"):
        torch.testing.assert_close(fused(image), expected)
    assert calls == [True]


def test_packing_after_the_first_call(image, calls):
    _, fused = pair()
    with torch.inference_mode():
        expected = fused(image)
        pack(fused)
        torch.testing.assert_close(fused(image), expected)
        assert all(packed._copies[id(m)] is not None for m in fused if isinstance(m, (nn.Conv2d, nn.Linear)))
        fused(image)
    assert calls == [True] * 3
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.mul_(0.5)
        expected = nn.Sequential(*fused)(image)
    with torch.inference_mode():
        torch.testing.assert_close(fused(image), expected)


def test_other_parameters_for_one_call(image):
    plain, fused = pair()
    expected = fused(image)
    other = {name: -p.detach() for name, p in fused.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(fused, other, image), torch.func.functional_call(plain, other, image)
    )
    torch.testing.assert_close(fused(image), expected)


def test_replicas_and_copies_have_plans_of_their_own(image):
    _, fused = pair()
    expected = fused(image)
    replica = fused._replicate_for_data_parallel()
    replica._modules["0"] = nn.Identity()
    torch.testing.assert_close(fused(image), expected)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.copy(fused)):
        torch.testing.assert_close(other(image), expected)
    assert copy.deepcopy(fused).__dict__["_plan"] is None


def test_what_a_module_was_is_not_kept_for_ever(image):
    _, fused = pair()
    fused(image)
    old = weakref.ref(fused[0].weight)
    replace_weight(fused)
    fused(image)
    gc.collect()
    assert old() is None
    module, fused[0].back = weakref.ref(fused), fused  # a cycle through what the guard holds
    fused(image)
    del fused
    gc.collect()
    assert module() is None


# ------------------------------------------------------------------------------------------------------------- the rest


def test_two_threads_call_one_net(image):
    """Threads call the net with other shapes and in other modes, while a third one changes the plan."""
    plain, fused = pair()
    images = [image.repeat(n, 1, 1, 1) for n in (1, 2, 3)]
    expected = [plain(x).detach() for x in images]
    failures, ready = [], threading.Barrier(3)

    def call(which: int) -> None:
        try:
            ready.wait()
            for _ in range(30):
                if which == 2:
                    fused[7].register_forward_hook(lambda *_: None).remove()
                with torch.set_grad_enabled(which == 1):
                    y = fused(images[which])
                torch.testing.assert_close(y, expected[which])
                if which == 1:
                    y.sum().backward()
        except BaseException as error:  # of another thread
            failures.append(error)

    threads = [threading.Thread(target=call, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.gpu
def test_one_net_on_two_streams(image):
    """A plan holds no memory of a call: calls whose work overlaps do not write into each other's."""
    _, fused = pair()
    fused, images = fused.cuda(), [image.cuda(), image.cuda() * 2]
    expected = [gradients(fused, x) for x in images]
    streams = [torch.cuda.Stream() for _ in images]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, x in zip(streams, images, strict=True):
            with torch.cuda.stream(stream):
                got.append(gradients(fused, x))
        torch.cuda.synchronize()
        for one, other in zip(got, expected, strict=True):
            for gradient, wanted in zip(one, other, strict=True):
                torch.testing.assert_close(gradient, wanted)


def test_forms_do_not_pile_up(image, monkeypatch):
    monkeypatch.setattr(runs, "MOST_FORMS", 2)
    _, fused = pair()
    for batch in range(1, 6):
        fused(image[:1].repeat(batch, 1, 1, 1))
    assert len(fused._plan.parts[0].natives) <= 2


def test_the_operator_takes_what_it_was_planned_for(image):
    _, fused = pair()
    with torch.no_grad():
        fused(image)
    (native,) = fused._plan.parts[0].natives.values()
    for x, parameters in [
        (image[:1], native.parameters),
        (image, native.parameters[:-1]),
        (image.double(), native.parameters),
        (image.to_sparse(), native.parameters),
    ]:
        if x.layout == torch.strided:
            assert run.RUN(x, parameters, native.number, 0, 0) == []
        else:
            with pytest.raises(NotImplementedError):
                run.RUN(x, parameters, native.number, 0, 0)
    with pytest.raises(RuntimeError, match="there is no run -1"):
        run.RUN(image, [], -1, 0, 0)
    with pytest.raises(RuntimeError, match="1 shapes for 2 tensors"):
        _C.Run([run.Layer("linear")], [(2, 3)])


# ------------------------------------------------------------------------------------------------ past the dispatcher


class Other(torch.Tensor):
    pass


def negated(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, which torch's dispatcher has to negate: memory holds the others."""
    return torch._neg_view(-x.detach())


@pytest.mark.parametrize("which", ["input", "gradient"])
def test_numbers_that_are_to_be_negated(image, which):
    fused = FusedSequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))  # kernels read both
    y = fused(image)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, list(fused.parameters()), dy)
    x = negated(image) if which == "input" else image
    got = torch.autograd.grad(fused(x), list(fused.parameters()), negated(dy) if which == "gradient" else dy)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["plain", "parameter", "negated", "no memory", "subclass", "sparse"])
def test_which_tensors_pass_by_the_dispatcher(image, kind):
    _, fused = pair()
    with torch.no_grad():
        expected = fused(image)
    (native,) = fused._plan.parts[0].natives.values()
    asked = []
    call = _C.direct("run", lambda *arguments: asked.append(arguments) or [], [], run.PLAIN, *run.CAPSULES)
    x = {
        "plain": lambda: image,
        "parameter": lambda: nn.Parameter(image, requires_grad=False),
        "negated": lambda: negated(image),
        "no memory": lambda: torch._efficientzerotensor(image.shape),
        "subclass": lambda: image.as_subclass(Other),
        "sparse": lambda: image.to_sparse(),
    }[kind]()
    results = call(x, native.parameters, native.number, 0, 0)
    if kind in ("plain", "parameter"):
        torch.testing.assert_close(results, [expected])
    assert len(asked) == (kind not in ("plain", "parameter"))


def test_a_gradient_without_memory(image):
    _, fused = pair()
    y = fused(image)
    zero = torch._efficientzerotensor(y.shape)
    assert all((grad == 0).all() for grad in torch.autograd.grad(y, list(fused.parameters()), zero))


@pytest.mark.parametrize("kind", ["modes", "profilers"])
def test_who_looks_at_operators_sees_runs(image, kind):
    _, fused = pair()
    y = fused(image)  # its run is no more than one of autograd's nodes
    if kind == "profilers":
        with torch.profiler.profile() as profile:
            y.sum().backward()
            fused(image)
        seen = {event.name for event in profile.events()} & {"alexnet_fast::run", "alexnet_fast::run_backward"}
        assert seen == {"alexnet_fast::run", "alexnet_fast::run_backward"}
    else:
        with Calls() as calls:
            y.sum().backward()
        assert torch.ops.alexnet_fast.run_backward.default in [function for function, _ in calls.calls]


def test_calls_keep_no_tensors(image):
    _, fused = pair()
    for gradients_too in (False, True):
        x = image.clone().requires_grad_(gradients_too)
        y = fused(x)
        if gradients_too:
            y.sum().backward()
        gone = [weakref.ref(tensor) for tensor in (x, y, x.grad) if tensor is not None]
        del x, y
        assert [tensor() for tensor in gone] == [None] * len(gone)
    weights = [weakref.ref(p) for p in fused.parameters()]
    del fused
    gc.collect()
    assert [weight() for weight in weights] == [None] * len(weights)


GUARDED = [
    (Is.object, {"a": 1}, "a", 1, lambda owner: owner.update(a=2)),
    (Is.object, {"a": 1}, "a", 1, lambda owner: owner.clear()),
    (Is.absent, {}, "a", None, lambda owner: owner.update(a=None)),
    (Is.empty, {"a": {}}, "a", None, lambda owner: owner["a"].update(b=1)),
    (Is.empty, {"a": {}}, "a", None, lambda owner: owner.update(a=0)),
    (Is.filled, {"a": {1: 1}}, "a", None, lambda owner: owner["a"].clear()),
    (Is.values, {"a": 1, "b": 2}, None, (1, 2), lambda owner: owner.update(b=3)),
    (Is.values, {"a": 1, "b": 2}, None, (1, 2), lambda owner: owner.update(c=3)),
    (Is.values, {"a": 1, "b": 2}, None, (1, 2), lambda owner: owner.pop("b")),
    (Is.type, nn.ReLU(), None, nn.ReLU, lambda owner: setattr(owner, "__class__", nn.Tanh)),
    (Is.attribute, nn.ReLU(), "inplace", False, lambda owner: setattr(owner, "inplace", True)),
    (Is.attribute, nn.ReLU(), "inplace", False, lambda owner: delattr(owner, "inplace")),
]


@pytest.mark.parametrize(("what", "owner", "key", "expected", "change"), GUARDED, ids=range(len(GUARDED)))
def test_a_guard_holds_until_its_entry_changes(what, owner, key, expected, change):
    owner, guard = copy.deepcopy(owner), _C.Guard()
    assert guard.holds()
    guard.add(what, owner, key, expected)
    assert guard.holds()
    change(owner)
    assert not guard.holds()
    assert not guard.holds()  # it has not become the usual


def test_a_guard_sees_each_of_a_dictionary_s_entries():
    """A change that keeps one entry does not hide another's, nor does a content that changes alone."""
    owner, guard = {"a": 1, "b": 2, "c": {}}, _C.Guard()
    for key in "ab":
        guard.add(Is.object, owner, key, owner[key])
    guard.add(Is.empty, owner, "c")
    assert guard.holds()
    owner["d"] = 0
    assert guard.holds()
    owner["b"] = 3
    assert not guard.holds()
    owner["b"] = 2
    owner["c"] = {}
    assert guard.holds()
    owner["c"]["e"] = 1
    assert not guard.holds()


def test_a_guard_asks_whether_somebody_looks():
    says = [False]
    guard = _C.Guard([lambda: says[0]])
    assert guard.holds()
    says[0] = True
    assert not guard.holds()
    says.clear()
    with pytest.raises(IndexError):
        guard.holds()


def test_a_guard_takes_dictionaries():
    with pytest.raises(TypeError, match="expected a dict"):
        _C.Guard().add(Is.empty, [], "a")
    with pytest.raises(TypeError, match="a tuple"):
        _C.Guard().add(Is.values, {}, None, [])
