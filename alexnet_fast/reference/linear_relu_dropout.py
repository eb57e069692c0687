from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WORD = 2**32


def linear_relu_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y = max(0, input · weightᵀ + bias), each element kept with probability 1 - p and divided by it, or else 0.

    Element i of y is kept if the first word of ``philox(seed, i)`` is at least p · 2³².
    """
    y = F.relu(F.linear(input, weight, bias))
    if not training or p == 0:
        return y
    return y * dropout_factors(y, p, seed_tensor(seed, y.device)) if p < 1 else y * 0


def linear_relu_dropout_backward(dy: Tensor, y: Tensor, p: float, want_bias: bool) -> tuple[Tensor, Tensor | None]:
    """∂L/∂z of z = input · weightᵀ, and ∂L/∂bias if wanted, by the output's zeros, which are both masks."""
    dz = torch.ops.aten.threshold_backward(dy / (1 - p) if p < 1 else dy * 0, y, 0)
    return dz, dz.sum(0) if want_bias else None


def dropout_factors(y: Tensor, p: float, seed: Tensor) -> Tensor:
    """1 / (1 - p) for the elements of y that stay and 0 for the others, in y's shape and dtype. p is under 1."""
    index = torch.arange(y.numel(), device=y.device).view(y.shape)
    kept = philox(seed, index)[0] >= round(p * WORD)
    return kept.to(y.dtype) / (1 - p)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """``seed`` as an int64 tensor of one element; drawn from torch's generator of ``device`` if None."""
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    return torch.tensor([seed], device=device)


def philox(key: Tensor, counter: Tensor, stream: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011): four words of 32 bits for each counter, in int64.

    ``key``, int64 of one element, and the elements of ``counter``, int64, are two words each; ``stream`` is a third of
    the counter. A word depends on these alone, so any device and any split of the work gives the same.
    """
    low = WORD - 1
    k0, k1 = key & low, (key >> 32) & low
    c0, c1, c2, c3 = counter & low, (counter >> 32) & low, torch.full_like(counter, stream), torch.zeros_like(counter)
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2⁶⁴, as int64 wraps
        c0, c1, c2, c3 = (b >> 32) & low ^ c1 ^ k0, b & low, (a >> 32) & low ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3
