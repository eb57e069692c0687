"""What no sample shows of the end of LPIPS's layers: pixels without features, 16 bits, memory, bad arguments."""

from __future__ import annotations

import pytest
import torch

from alexnet_fast import ops

from .compare import DTYPES, saved_bytes
from .layouts import relayout

LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@pytest.mark.parametrize("dtype", DTYPES)
@LAYOUTS
def test_pixels_without_features(dtype, layout, backend, device):
    """Of one image or of both: direction 0, and gradient 0; the other image's gradient is what it is."""
    x = relayout(torch.rand(2, 16, 3, 70).to(device, dtype), layout)
    x[0, :, 0, 1] = 0
    x[:, :, 1, 69] = 0
    x.requires_grad_()
    weight = torch.rand(16, device=device)
    y = ops.lpips_layer(x, weight, spatial=True, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    other = x[1, :, 0, 1].double()
    alone = (weight.double() * (other / other.norm()) ** 2).sum()
    torch.testing.assert_close(y[0, 0, 0, 1].double(), alone, rtol=1e-5, atol=0)
    assert y[0, 0, 1, 69] == 0
    assert not dx[0, :, 0, 1].any()
    assert not dx[:, :, 1, 69].any()
    assert dx[1, :, 0, 1].abs().max() > 0
    assert dx.isfinite().all()


@LAYOUTS
def test_nan_stays_at_its_pixel(layout, backend, device):
    x = torch.rand(2, 16, 3, 70, device=device)
    x[1, 3, 2, 5] = torch.nan
    x = relayout(x, layout).requires_grad_()
    y = ops.lpips_layer(x, torch.rand(16, device=device), spatial=True, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.isnan().nonzero().tolist() == [[0, 0, 2, 5]]
    assert {tuple(place[2:]) for place in dx.isnan().nonzero().tolist()} == {(2, 5)}


@pytest.mark.parametrize("magnitude", [300.0, 1e-4])
def test_float16_neither_overflows_nor_divides_by_zero(magnitude, backend, device):
    """300² is past float16's 65504, and 1e-4² and ε are 0 in it."""
    x = (magnitude * torch.randn(4, 24, 5, 5, device=device)).half()
    weight = torch.rand(24, device=device)
    exact = ops.lpips_layer(x.double().cpu(), weight.double().cpu(), backend="reference")
    y = ops.lpips_layer(x, weight, backend=backend)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double().cpu(), exact, rtol=1e-5, atol=0)


def test_images_that_are_nearly_alike_keep_their_digits(backend, device):
    """In the expanded form, w (u² − 2uv + v²), the distance of these would be rounding noise."""
    x = torch.rand(1, 64, 4, 4, device=device)
    pair = torch.cat([x, x + 1e-4 * torch.randn_like(x)])
    weight = torch.rand(64, device=device)
    exact = ops.lpips_layer(pair.double().cpu(), weight.double().cpu(), backend="reference")
    y = ops.lpips_layer(pair, weight, backend=backend)
    torch.testing.assert_close(y.double().cpu(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("spatial", [True, False])
def test_saves_features_and_weight_and_nothing_else(spatial):
    x, weight = torch.rand(4, 16, 6, 6, requires_grad=True), torch.rand(16, requires_grad=True)
    assert saved_bytes(lambda: ops.lpips_layer(x, weight, spatial, backend="cpu")) == 4 * (x.numel() + weight.numel())


@pytest.mark.parametrize(
    ("arguments", "exception", "pieces"),
    [
        ({"input": [1]}, TypeError, ["input", "Tensor", "list"]),
        ({"input": torch.ones(4, 8)}, ValueError, ["input", "4 dimensions", "got 2"]),
        ({"input": torch.ones(3, 8, 2, 2)}, ValueError, ["input", "even batch", "(3, 8, 2, 2)"]),
        ({"input": torch.ones(2, 8, 0, 2)}, ValueError, ["input", "only the batch", "(2, 8, 0, 2)"]),
        ({"input": torch.ones(2, 8, 2, 2).int()}, TypeError, ["input", "float32", "torch.int32"]),
        ({"weight": torch.ones(7)}, ValueError, ["weight", "8 channels", "got 7"]),
        ({"weight": torch.ones(1, 8)}, ValueError, ["weight", "1 dimensions", "got 2"]),
        ({"weight": torch.ones(8, device="meta")}, ValueError, ["weight", "meta", "cpu"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, exception, pieces):
    with pytest.raises(exception) as caught:
        ops.lpips_layer(**{"input": torch.ones(2, 8, 2, 2), "weight": torch.ones(8), **arguments})
    assert all(piece in str(caught.value) for piece in pieces), str(caught.value)
