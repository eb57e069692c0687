"""SGD: torch's to the bit, the 2012 rule, 16-bit parameters with float32 masters, and what is saved."""

from __future__ import annotations

import copy
import platform

import pytest
import torch
from torch import nn

from alexnet_fast import _C, backend
from alexnet_fast.optim import SGD

# A vector of any length, a matrix, a channels_last kernel, a scalar, and one with several pieces of work.
SHAPES = [(7,), (33, 5), (8, 6, 3, 3), (), (40_000,)]
OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 5e-4},
    {"weight_decay": 1e-2},
    {"momentum": 0.8, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    made[2] = made[2].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in made]


def run(optimizer: torch.optim.Optimizer, steps: int = 4, seed: int = 1) -> None:
    """Some steps with gradients of a layout of their own; the learning rate changes half way."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            if step == steps // 2:
                group["lr"] *= 0.3
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


fused = pytest.mark.skipif(
    platform.machine() == "x86_64"
    and (_C.build_info()["cpu_isa"] == "baseline") != (torch.backends.cpu.get_cpu_capability() == "DEFAULT"),
    reason="of torch and this package one alone was told to do without fused multiply-add",
)


@fused
@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_to_torch(options, name):
    """Bit for bit, weights and state; zero's sign counts."""
    ours, theirs = parameters(), parameters()
    optimizer, peer = SGD(ours, lr=0.1, **options), torch.optim.SGD(theirs, lr=0.1, **options)
    with backend(name):
        run(optimizer)
    run(peer)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a.signbit(), b.signbit())
        if options.get("momentum"):
            assert torch.equal(optimizer.state[a]["momentum_buffer"], peer.state[b]["momentum_buffer"])


def test_the_rule_of_2012():
    """Against the paper's formula in float64; and it is not torch's once the learning rate has changed."""
    ours, theirs = parameters(), parameters()
    exact = [parameter.detach().double() for parameter in ours]
    velocity = [torch.zeros_like(weight) for weight in exact]
    optimizer = SGD(ours, lr=0.01, momentum=0.9, weight_decay=5e-4, rule="2012")
    peer = torch.optim.SGD(theirs, lr=0.01, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        lr = 0.01 if step < 2 else 0.001
        optimizer.param_groups[0]["lr"] = peer.param_groups[0]["lr"] = lr
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad = other.grad = torch.randn(mine.shape, generator=generator)
            velocity[i] = 0.9 * velocity[i] - 5e-4 * lr * exact[i] - lr * mine.grad.double()
            exact[i] = exact[i] + velocity[i]
        optimizer.step()
        peer.step()
        for mine, weight in zip(ours, exact, strict=True):
            torch.testing.assert_close(mine.double(), weight, rtol=1e-6, atol=1e-6)
        same = torch.allclose(ours[-1], theirs[-1], rtol=1e-5, atol=1e-6)
        assert same == (step < 2)


@fused
@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["torch", "2012"])
def test_masters(rule, dtype, name):
    """16-bit parameters follow a float32 net that sees the same gradients, rounded once, and do not stall: steps far
    below a parameter's last place add up in the master."""
    half = parameters(dtype)
    masters = [nn.Parameter(parameter.detach().float()) for parameter in half]
    optimizer = SGD(half, lr=1e-4, momentum=0.9, weight_decay=5e-4, rule=rule)
    peer = SGD(masters, lr=1e-4, momentum=0.9, weight_decay=5e-4, rule=rule)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for parameter, master in zip(half, masters, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            master.grad = parameter.grad.float()
        with backend(name):
            optimizer.step()
        peer.step()
    for parameter, master in zip(half, masters, strict=True):
        assert torch.equal(optimizer.state[parameter]["master"], master)
        assert torch.equal(parameter, master.to(dtype))
        assert optimizer.state[parameter]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_optimizer_goes_on(dtype):
    """torch's load_state_dict would round a float32 master to bfloat16."""
    straight, resumed = parameters(dtype), parameters(dtype)
    optimizer = SGD(straight, lr=0.1, momentum=0.9)
    run(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for parameter, source in zip(resumed, straight, strict=True):
        parameter.data.copy_(source)
    other = SGD(resumed, lr=0.5, momentum=0.9)
    other.load_state_dict(saved)
    run(optimizer, seed=2)
    run(other, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@fused
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}], ids=str)
@pytest.mark.parametrize(("first", "second"), [(torch.optim.SGD, SGD), (SGD, torch.optim.SGD)])
def test_either_takes_over_the_others_state(first, second, options):
    """Of the same keys, and with the options, the rule among them, of the one that saved it."""
    straight, resumed = parameters(), parameters()
    before = first(straight, lr=0.1, **options)
    run(before)
    for parameter, source in zip(resumed, straight, strict=True):
        parameter.data.copy_(source)
    after = second(resumed, **({"rule": "2012"} if second is SGD else {}))
    saved = copy.deepcopy(before.state_dict())
    after.load_state_dict(saved)
    assert {n: set(s) for n, s in after.state_dict()["state"].items()} == {n: set(s) for n, s in saved["state"].items()}
    assert len(saved["state"]) == (len(SHAPES) if options else 0)
    run(before, seed=2)
    run(after, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("option", ["maximize", "differentiable"])
def test_what_torch_has_and_we_do_not_is_refused(option):
    state = torch.optim.SGD(parameters(), lr=0.1, **{option: True}).state_dict()
    with pytest.raises(ValueError, match=f"{option}: expected False, got True"):
        SGD(parameters()).load_state_dict(state)


def test_what_no_kernel_covers():
    """float64, a parameter with gaps, and one without a gradient."""
    wide = nn.Parameter(torch.ones(4, dtype=torch.float64))
    gaps = nn.Parameter(torch.ones(4, 6)[:, ::2])
    idle = nn.Parameter(torch.ones(4))
    optimizer = SGD([wide, gaps, idle], lr=0.5, momentum=0.9)
    wide.grad, gaps.grad = torch.ones_like(wide), torch.ones_like(gaps)
    optimizer.step()
    assert torch.equal(wide, torch.full((4,), 0.5, dtype=torch.float64))
    assert torch.equal(gaps, torch.full((4, 3), 0.5))
    assert torch.equal(idle, torch.ones(4))
    assert idle not in optimizer.state


def test_sparse_gradients():
    """The same numbers as torch's, in a dense velocity."""
    ours, theirs = (nn.Embedding.from_pretrained(torch.ones(5, 3), freeze=False, sparse=True) for _ in range(2))
    steps = SGD(ours.parameters(), lr=0.1, momentum=0.9), torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for rows in ([0, 2, 2], [1, 2, 4]):
        for layer, optimizer in zip((ours, theirs), steps, strict=True):
            optimizer.zero_grad()
            layer(torch.tensor(rows)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_from_before_the_step_is_refused(dtype):
    """A backward pass through such a graph would mix old values with new ones."""
    weight = nn.Parameter(torch.ones(3, dtype=dtype))
    loss = weight.square().sum()
    weight.grad = torch.ones_like(weight)
    SGD([weight], lr=0.5).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck():
    generator = torch.Generator().manual_seed(0)
    weight, grad, velocity = (torch.randn(7, generator=generator) for _ in range(3))
    options = 0.1, 0.9, 0.0, 5e-4, False, False, False
    call = torch.ops.alexnet_fast.sgd_.default
    torch.library.opcheck(call, (weight, grad, velocity, None, *options))
    torch.library.opcheck(call, (weight, grad.bfloat16(), velocity, weight.bfloat16(), *options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"velocity": None}, "momentum needs a velocity"),
        ({"grad": torch.zeros(3, 5)}, "grad has size 3 in dimension 0, expected 4"),
        ({"grad": torch.zeros(5, 4).T}, "grad has other strides than weight"),
        ({"velocity": torch.zeros(4, 5).double()}, "velocity has another dtype"),
        ({"copy": torch.zeros(4, 5).half()}, "grad has another dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_foreign_memory_is_not_touched(change, message):
    """The operator itself refuses it too."""
    tensors = {"weight": torch.zeros(4, 5), "grad": torch.zeros(4, 5), "velocity": torch.zeros(4, 5), "copy": None}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.alexnet_fast.sgd_(*(tensors | change).values(), 0.1, 0.9, 0.0, 0.0, False, False, False)


def test_closure_and_groups():
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = SGD([{"params": [first]}, {"params": [second], "lr": 0.25}], lr=0.5)

    def closure() -> torch.Tensor:
        loss = (first + second).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6
    assert torch.equal(first, torch.full((3,), 0.5))
    assert torch.equal(second, torch.full((3,), 0.75))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert optimizer.param_groups[-1]["rule"] == "torch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "adam"}, "rule: expected one of torch, 2012, got 'adam'"),
        ({"rule": "2012", "nesterov": True, "momentum": 0.9}, "rule: '2012' has neither dampening nor nesterov"),
        ({"rule": "2012", "dampening": 0.1}, "rule: '2012' has neither dampening nor nesterov"),
        ({"lr": torch.ones(1)}, "lr: expected a float"),
        ({"lr": -1.0}, "learning rate"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SGD(parameters(), **options)


# ---- Sharded parameters --------------------------------------------------------------------------------------------


@pytest.fixture
def group():
    """A process group of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp2(group, dtype):
    """The same weights as without, bit for bit, and a sharded state."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    nets = [nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    fully_shard(nets[1], mesh=init_device_mesh("cpu", (1,)))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
    steppers = [SGD(net.parameters(), **options) for net in nets]
    for _ in range(3):
        x = torch.randn(4, 7, dtype=dtype)
        for net, stepper in zip(nets, steppers, strict=True):
            stepper.zero_grad()
            net(x).square().sum().backward()
            stepper.step()
    for plain, sharded in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(plain, sharded.full_tensor())
        assert isinstance(steppers[1].state[sharded]["momentum_buffer"], DTensor)
    steppers[1].load_state_dict(steppers[1].state_dict())
    steppers[1].step()
