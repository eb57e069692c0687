"""Crops, mirrors, colour noise and normalization: the same to the bit everywhere, and an image's own."""

from __future__ import annotations

import pytest
import torch

from alexnet_fast import ops
from alexnet_fast.ops.augment import IMAGENET_COLOUR
from alexnet_fast.reference.augment import draw

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RAW = (0.0, 0.0, 0.0), (1 / 255,) * 3  # leaves pixels as they are
FOLDS = {
    "AlexNet": ops.SpaceToDepth(11, 4, 2),
    "unpadded": ops.SpaceToDepth(11, 4),
    "uneven": ops.SpaceToDepth((3, 5), (2, 3), (1, 4)),
    "padding over a stride": ops.SpaceToDepth(7, 2, 5),
    "pixels that no window sees": ops.SpaceToDepth(2, 5, 0),
    "padding alone": ops.SpaceToDepth(3, 1, 1),
}


def pictures(batch: int = 6, height: int = 12, width: int = 15) -> torch.Tensor:
    """uint8 (N, 3, H, W) channels_last in which no two pixels of an image are equal."""
    numbers = torch.arange(height * width).view(1, 1, height, width).expand(batch, 3, -1, -1)
    noise = torch.randint(256, (batch, 3, 1, 1), generator=torch.Generator().manual_seed(0))
    return ((numbers + noise) % 256).to(torch.uint8).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, (12, 15), (5, 11)])
@pytest.mark.parametrize("drawn", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_equal_to_the_reference(size, drawn, layout, dtype, backend, device):
    """To the bit, for rows of any length and any dtype."""
    images = pictures().contiguous(memory_format=layout)
    more = {"index": torch.arange(100, 106), "epoch": 3, "seed": 5, "colour": IMAGENET_COLOUR} if drawn else {}
    expected = ops.augment(images, size, MEAN, STD, dtype=dtype, backend="reference", **more)
    y = ops.augment(images.to(device), size, MEAN, STD, dtype=dtype, backend=backend, **more)
    assert torch.equal(y.cpu(), expected)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)


def folded(x: torch.Tensor, fold: ops.SpaceToDepth) -> torch.Tensor:
    """Pixel (i · s + a - padding, j · s + b - padding) of ``x`` in channels (a, b, c) of pixel (i, j), element by
    element: as many pixels as windows of whole strides begin at."""
    kernel, stride, padding = ((v, v) if isinstance(v, int) else v for v in fold)
    places = []
    for axis in range(2):
        outs = (x.shape[2 + axis] + 2 * padding[axis] - kernel[axis]) // stride[axis] + 1
        pixels = stride[axis] * (outs - 1 + -(-kernel[axis] // stride[axis]))
        places.append(torch.arange(pixels) - padding[axis])
    rows, columns = places
    seen = x[:, :, rows.clamp(0, x.shape[2] - 1)][..., columns.clamp(0, x.shape[3] - 1)]
    inside = (rows >= 0) & (rows < x.shape[2]), (columns >= 0) & (columns < x.shape[3])
    seen = torch.where(inside[0][:, None] & inside[1], seen, 0)
    parts = [seen[:, :, a :: stride[0], b :: stride[1]] for a in range(stride[0]) for b in range(stride[1])]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(12, 15), (11, 14), 11], ids=str)
@pytest.mark.parametrize("drawn", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS.keys())
def test_folded_is_the_fold_of_what_is_not(fold, size, drawn, dtype, backend, device):
    """To the bit, with mean and std by which a pixel of 0 is not 0."""
    images = pictures()
    more = {"index": torch.arange(100, 106), "epoch": 3, "seed": 5, "colour": IMAGENET_COLOUR} if drawn else {}
    expected = folded(ops.augment(images, size, MEAN, STD, dtype=dtype, backend="reference", **more), fold)
    y = ops.augment(images.to(device), size, MEAN, STD, dtype=dtype, fold=fold, backend=backend, **more)
    assert torch.equal(y.cpu(), expected)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_alexnets_fold(backend, device):
    images = torch.randint(256, (2, 3, 230, 240), dtype=torch.uint8, device=device)
    for fold, size in ((FOLDS["AlexNet"], 224), (FOLDS["unpadded"], 227)):
        assert ops.augment(images, size, MEAN, STD, fold=fold, backend=backend).shape == (2, 48, 57, 57)


def test_normalization(backend, device):
    """Without a crop it is the usual normalization: (x / 255 - mean) / std."""
    images = pictures()
    y = ops.augment(images.to(device), (12, 15), MEAN, STD, backend=backend)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(y.cpu().double(), (images.double() / 255 - mean) / std, rtol=1e-6, atol=1e-6)


def found(image: torch.Tensor, crop: torch.Tensor) -> set[tuple[int, int, bool]]:
    """Where in the image, mirrored or not, the crop lies."""
    height, width = crop.shape[1:]
    places = set()
    for mirrored in (False, True):
        windows = image.unfold(1, height, 1).unfold(2, width, 1)
        match = (windows == (crop.flip(2) if mirrored else crop)[:, None, None]).all(-1).all(-1).all(0)
        places |= {(*place, mirrored) for place in match.nonzero().tolist()}
    return places


def test_crops_are_windows_of_their_image(backend, device):
    images = pictures(64)
    crops = ops.augment(images.to(device), (8, 10), *RAW, index=torch.arange(64), backend=backend).cpu()
    places = [found(image, crop) for image, crop in zip(images.float(), crops, strict=True)]
    assert all(len(place) == 1 for place in places)
    rows, columns, mirrored = zip(*(place.pop() for place in places), strict=True)
    assert set(rows) == set(range(5))
    assert set(columns) == set(range(6))
    assert 16 < sum(mirrored) < 48
    centre = ops.augment(images.to(device), (8, 10), *RAW, backend=backend).cpu()
    assert found(images[0].float(), centre[0]) == {(2, 2, False)}


def test_draws_are_the_images_own(backend, device):
    """The same in any batch and any order; others in another epoch, of another seed, of another image."""
    images = pictures(1).expand(32, -1, -1, -1).to(device)
    index = torch.arange(32) * 1_000_000_007

    def crops(part=slice(None), **more) -> torch.Tensor:
        more = {"epoch": 1, "seed": 2, **more}
        return ops.augment(images[part], 5, *RAW, index=index[part], colour=torch.eye(3), backend=backend, **more)

    whole = crops()
    assert torch.equal(crops(slice(1, None, 2)), whole[1::2])
    assert not torch.equal(crops(epoch=2), whole)
    assert not torch.equal(crops(seed=3), whole)
    assert whole.flatten(1).unique(dim=0).shape[0] == 32


def test_draws_stay_what_they_were():
    """A run that another version resumes sees the crops it would have seen: these are words of Philox with the key 5
    and the counters (100, 0, 9) and (2⁴⁰ + 1, 256, 9)."""
    drawn = draw(2, 32, 32, torch.tensor([100, 2**40 + 1]), 3, 5, True)
    assert drawn.place.tolist() == [[30, 20, 1], [4, 1, 0]]


def test_without_mirror(backend, device):
    images = pictures(32)
    crops = ops.augment(images.to(device), 6, *RAW, index=torch.arange(32), mirror=False, backend=backend).cpu()
    pairs = zip(images.float(), crops, strict=True)
    assert not any(mirrored for image, crop in pairs for *_, mirrored in found(image, crop))


def test_colour_noise_is_normal(backend, device):
    """Of 4096 images: mean 0 and the covariance colour · colourᵀ, within five standard errors; one value an image."""
    images = torch.zeros(4096, 3, 2, 2, dtype=torch.uint8, device=device)
    colour = torch.tensor([[0.5, 0.0, 0.0], [0.25, 0.3, 0.0], [0.0, 0.1, 0.2]])
    noise = ops.augment(images, 2, (0, 0, 0), (1, 1, 1), index=torch.arange(4096), colour=colour, backend=backend)
    assert (noise == noise[:, :, :1, :1]).all()
    values = noise[:, :, 0, 0].cpu().double()
    expected = colour.double() @ colour.double().T
    spread = expected.diagonal().sqrt()
    assert (values.mean(0).abs() < 5 * spread / 64).all()
    assert ((values.T.cov() - expected).abs() < 5 * 2**0.5 * spread[:, None] * spread / 64).all()


def test_empty(backend, device):
    images = torch.zeros(0, 3, 9, 9, dtype=torch.uint8, device=device)
    index = torch.zeros(0, dtype=torch.int64)
    assert ops.augment(images, 5, MEAN, STD, index=index, backend=backend).shape == (0, 3, 5, 5)
    fold = ops.SpaceToDepth(3, 2, 1)
    assert ops.augment(images, 5, MEAN, STD, index=index, fold=fold, backend=backend).shape == (0, 12, 4, 4)


def test_opcheck():
    place, shift = torch.tensor([[1, 2, 1], [0, 0, 0]], dtype=torch.int32), torch.rand(2, 3)
    call = torch.ops.alexnet_fast.augment.default
    for dtype in (torch.float32, torch.bfloat16):
        for fold in (([1, 1], [0, 0], [4, 5]), ([2, 3], [1, 0], [3, 2])):
            arguments = (pictures(2), place, shift, torch.rand(3) + 1, 4, 5, dtype, *fold)
            torch.library.opcheck(call, arguments)


def test_a_crop_beyond_the_image_is_refused():
    """The operator itself checks this too, or it would read foreign memory."""
    for place in ([9, 0, 0], [0, 11, 0], [-1, 0, 0]):
        with pytest.raises(RuntimeError, match="augment: the crop of image 0 reaches beyond it"):
            torch.ops.alexnet_fast.augment(
                pictures(1),
                torch.tensor([place], dtype=torch.int32),
                torch.rand(1, 3),
                torch.rand(3),
                4,
                5,
                torch.float32,
                *([1, 1], [0, 0], [4, 5]),
            )


def test_a_fold_that_is_none_is_refused():
    place = torch.zeros(1, 3, dtype=torch.int32), torch.rand(1, 3), torch.rand(3)
    for fold in (([0, 1], [0, 0], [4, 5]), ([1, 1], [0, -1], [4, 5]), ([1, 1], [0, 0], [0, 5])):
        with pytest.raises(RuntimeError, match="are no fold"):
            torch.ops.alexnet_fast.augment(pictures(1), *place, 4, 5, torch.float32, *fold)


@pytest.mark.parametrize(
    ("arguments", "exception", "pieces"),
    [
        ({"images": torch.zeros(2, 3, 9, 9)}, TypeError, ["images", "uint8", "torch.float32"]),
        ({"images": [1]}, TypeError, ["images", "uint8", "list"]),
        (
            {"images": torch.zeros(2, 1, 9, 9, dtype=torch.uint8)},
            ValueError,
            ["images", "(N, 3, H, W)", "(2, 1, 9, 9)"],
        ),
        ({"size": 13}, ValueError, ["size", "(12, 15)", "got 13"]),
        ({"size": 0}, ValueError, ["size", "at least 1", "got 0"]),
        ({"mean": (0.5, 0.5)}, ValueError, ["mean", "three", "got 2"]),
        ({"std": (1.0,)}, ValueError, ["std", "three", "got 1"]),
        ({"index": torch.arange(2)}, ValueError, ["index", "(6,)", "(2,)"]),
        ({"index": torch.rand(6)}, ValueError, ["index", "int64", "torch.float32"]),
        ({"epoch": -1}, ValueError, ["epoch", "0 to 2**30", "got -1"]),
        ({"seed": 2**63}, ValueError, ["seed", "int64", "got 9223372036854775808"]),
        ({"colour": torch.zeros(3)}, ValueError, ["colour", "(3, 3)", "(3,)"]),
        ({"dtype": torch.float64}, TypeError, ["dtype", "bfloat16", "torch.float64"]),
        ({"fold": (11, 4, 2)}, TypeError, ["fold", "SpaceToDepth", "(11, 4, 2)"]),
        ({"fold": ops.SpaceToDepth(3, 0)}, ValueError, ["fold.stride", "at least 1", "got 0"]),
        ({"fold": ops.SpaceToDepth(3.5, 2)}, TypeError, ["fold.kernel_size", "int", "3.5"]),
        ({"fold": ops.SpaceToDepth(11, 4, 2)}, ValueError, ["fold", "window of 11", "side 5"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, exception, pieces):
    with pytest.raises(exception) as caught:
        ops.augment(**{"images": pictures(), "size": 5, "mean": MEAN, "std": STD, **arguments})
    assert all(piece in str(caught.value) for piece in pieces), str(caught.value)
