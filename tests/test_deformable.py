"""Laws of deformable attention and of the pixel decoder made of it."""

import itertools

import pytest
import torch
from tiny import model
from torch import Tensor

from schemas.jobs import BackboneConfig
from xdecoder.model.backbone import Backbone
from xdecoder.model.deformable import LEVELS, POINTS, DeformableAttention, DeformablePixelDecoder, attend

GRIDS = [(2, 3), (4, 6), (8, 12)]
CELLS = sum(h * w for h, w in GRIDS)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(level: Tensor, x: float, y: float) -> Tensor:
    """float[h, w, C] at x, y in cells, a cell's middle at one half: bilinear, outside is zero."""
    height, width, _ = level.shape
    total = torch.zeros(level.shape[2], dtype=level.dtype)
    for row, column in itertools.product(range(height), range(width)):
        near = max(0.0, 1 - abs(x - column - 0.5)) * max(0.0, 1 - abs(y - row - 0.5))
        total = total + near * level[row, column]
    return total


def test_attention_equals_its_definition() -> None:
    """Deformable DETR, equation 3: sum over heads, levels and points of weight times value at the place."""
    heads, each, queries = 2, 4, 3
    value = noise(1, CELLS, heads, each).double()
    places = torch.rand(1, queries, heads, LEVELS, POINTS, 2, generator=torch.Generator().manual_seed(1))
    places = (1.4 * places - 0.2).double()  # some outside
    weights = noise(1, queries, heads, LEVELS, POINTS, seed=2).double()
    found = attend(value, GRIDS, places, weights)
    levels = [
        part.unflatten(0, grid)
        for part, grid in zip(value[0].split([h * w for h, w in GRIDS]), GRIDS, strict=True)
    ]
    for q, head in itertools.product(range(queries), range(heads)):
        expected = torch.zeros(each, dtype=torch.float64)
        for i, p in itertools.product(range(LEVELS), range(POINTS)):
            x, y = (places[0, q, head, i, p] * torch.tensor(GRIDS[i][::-1])).tolist()
            expected += weights[0, q, head, i, p] * read(levels[i][:, :, head], x, y)
        torch.testing.assert_close(found[0, q].unflatten(0, (heads, each))[head], expected)


def test_at_first_each_head_looks_its_own_way_one_to_four_cells_far() -> None:
    attention = DeformableAttention(32, 4)
    offsets = attention.offsets(noise(1, 1, 32)).view(4, LEVELS, POINTS, 2)
    ways = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    expected = ways[:, None, None] * torch.tensor([1.0, 2, 3, 4])[:, None]
    torch.testing.assert_close(offsets, expected.expand(-1, LEVELS, -1, -1), atol=1e-6, rtol=0)
    assert not attention.weights(noise(1, 1, 32)).any()


def decoder(channels: list[int]) -> DeformablePixelDecoder:
    torch.manual_seed(0)
    return DeformablePixelDecoder(channels, 32, 4, 64, layers=2)


@pytest.mark.parametrize("count", [3, 4])
def test_levels_come_coarsest_first_and_mask_features_are_the_finest(count: int) -> None:
    sides = [32, 16, 8, 4][-count:]
    features = [noise(2, 8 * (i + 1), side, 2 * side) for i, side in enumerate(sides)]
    of = decoder([8 * (i + 1) for i in range(count)])
    for name, parameter in of.named_parameters():  # what starts at zero holds back the first gradient
        if "attention.offsets.weight" in name or "attention.weights.weight" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    mask_features, levels = of(features, torch.zeros(2, 128, 256, dtype=torch.bool))
    assert [tuple(level.shape) for level in levels] == [(2, 32, s, 2 * s) for s in (4, 8, 16)]
    assert mask_features.shape == (2, 32, sides[0], 2 * sides[0])
    (mask_features.sum() + sum(level.square().sum() for level in levels)).backward()
    still = [name for name, p in of.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_what_stands_in_the_padding_is_never_read() -> None:
    of = decoder([8, 8, 8]).eval()
    padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    padding[:, :, 32:] = True
    maps = [noise(1, 32, side, side, seed=side) for side in (2, 4, 8)]  # behind their normalisation
    other = [m.clone() for m in maps]
    for m in other:
        m[..., m.shape[-1] // 2 :] = 100
    # a picture alone equals the same picture beside padding
    alone = [m[..., : m.shape[-1] // 2] for m in maps]
    with torch.no_grad():
        one, two = of._encode(maps, padding), of._encode(other, padding)
        three = of._encode(alone, padding[:, :, :32])
    for a, b, c in zip(one, two, three, strict=True):
        half = a.shape[-1] // 2
        torch.testing.assert_close(a[..., :half], b[..., :half])
        torch.testing.assert_close(a[..., :half], c, atol=1e-5, rtol=1e-5)


def test_a_model_is_made_with_it_by_a_setting() -> None:
    of = model(pixel_decoder="deformable")
    pixels = of.encode(torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    assert isinstance(of.pixel_decoder, DeformablePixelDecoder)
    assert [level.grid for level in pixels.levels] == [(4, 4), (8, 8), (16, 16)]


def test_backbones_that_put_channels_last_are_turned() -> None:
    config = BackboneConfig(
        name="swin_tiny_patch4_window7_224",
        out_indices=(0, 1, 2, 3),
        options={
            "strict_img_size": False,
            "embed_dim": 24,
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 4, 8),
        },
    )
    of = Backbone(config)
    maps = of(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 16, 24), (48, 8, 12), (96, 4, 6), (192, 2, 3)]
    assert of.channels == [24, 48, 96, 192] and of.strides == [4, 8, 16, 32]
