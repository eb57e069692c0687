"""A custom operator in the order in which this package writes its own: formula, schema, kernel, fake, gradient, proof.

    y = x · min(max(x + 3, 0), 6) / 6                                           (hard swish)
    ∂L/∂x = g · 0 for x < -3,   g · (2x + 3) / 6 for -3 < x < 3,   g for x > 3

python examples/write_an_operator.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# The schema says what the dispatcher needs: types, and that nothing is written to.
library = torch.library.Library("examples", "DEF")
library.define("swish(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.define("swish_backward(Tensor dy, Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


# The kernels: plain PyTorch here. A C++ or CUDA one fills the same slot, from TORCH_LIBRARY_IMPL.
def swish_cpu(x: Tensor) -> Tensor:
    return x * (x + 3).clamp(0, 6) / 6


def swish_backward_cpu(dy: Tensor, x: Tensor) -> Tensor:
    slope = torch.where(x < -3, 0.0, torch.where(x > 3, 1.0, (2 * x + 3) / 6))
    return (dy * slope).to(x.dtype)


library.impl("swish", swish_cpu, "CPU")
library.impl("swish_backward", swish_backward_cpu, "CPU")

# The fakes: shape, dtype and strides of the result, without computing it. torch.compile and torch.export ask them.
torch.library.register_fake("examples::swish", torch.empty_like, lib=library)
torch.library.register_fake("examples::swish_backward", lambda dy, x: torch.empty_like(x), lib=library)


# The gradient: what forward keeps, and the operator that backward is. That one has none: a second derivative raises.
# (alexnet_fast's own have a formula of torch operators for create_graph=True: ops/registry.py.)
def setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx, dy: Tensor) -> Tensor:
    return torch.ops.examples.swish_backward(dy, *ctx.saved_tensors)


torch.library.register_autograd("examples::swish", backward, setup_context=setup_context, lib=library)


def swish(x: Tensor) -> Tensor:
    return torch.ops.examples.swish(x)


def main() -> None:
    torch.manual_seed(0)
    # Right: against PyTorch's own, in a wider type; its gradient against differences; its registration by opcheck.
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(swish(x), F.hardswish(x))
    few = x.detach()[:20].requires_grad_()
    assert torch.autograd.gradcheck(swish, (few,))
    torch.library.opcheck(torch.ops.examples.swish.default, (few,))
    # At the edges, where formulas break: NaN stays, the ends are flat and steep, an empty tensor is one.
    edges = torch.tensor([float("nan"), -3.0, 3.0, -100.0, 100.0])
    torch.testing.assert_close(swish(edges), F.hardswish(edges), equal_nan=True)
    assert swish(torch.zeros(0, 3)).shape == (0, 3)
    # In graphs: one node, no break.
    compiled = torch.compile(lambda x: swish(x) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), swish(x) + 1)
    print("examples::swish is right, differentiable, and compiles to one graph")


if __name__ == "__main__":
    main()
