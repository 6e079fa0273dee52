"""The pyramid to one width by multi-scale deformable attention (Mask2Former, 2.3; OneFormer, 1.7).

A cell looks at a few places of every level that it chooses itself, so three levels cost little more than one.
Plain PyTorch: places are read by `grid_sample`, which runs and exports everywhere, and in fp32.

Letters: `B` images, `S` cells of all levels, `D` width, `h w` a level's grid, `L` levels, `P` points a level.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdecoder.model.layers import FeedForward, sine_positions
from xdecoder.model.pixel_decoder import conv

LEVELS, POINTS = 3, 4  # strides 32, 16, 8; places a head looks at on each (Mask2Former, 2.3)
Grids = Sequence[tuple[int, int]]


def attend(value: Tensor, grids: Grids, places: Tensor, weights: Tensor) -> Tensor:
    """Read every level at its places and add what is found, by weight.

    value      float[B, S, heads, D / heads], the levels of `grids` one after another, S cells in all
    places     float[B, N, heads, L, P, 2], x and y in [0, 1] of a level; outside is zero, between is bilinear
    weights    float[B, N, heads, L, P]
    returns    float[B, N, D]
    """
    levels = value.split([h * w for h, w in grids], 1)
    where = (2 * places - 1).permute(3, 0, 2, 4, 1, 5)  # [L, B, heads, P, N, 2]
    shares = weights.permute(3, 0, 2, 4, 1)
    found = value.new_zeros(())
    for level, (height, width), grid, share in zip(levels, grids, where, shares, strict=True):
        maps = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (height, width))
        read = F.grid_sample(maps, grid.flatten(0, 1), mode="bilinear", align_corners=False)
        # [B heads, D / heads, P, N]: point by point, since the product of all at once is large and not kept
        for point, part in zip(read.unbind(2), share.flatten(0, 1).unbind(1), strict=True):
            found = found + point * part[:, None]
    return found.unflatten(0, (value.shape[0], -1)).flatten(1, 2).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Every cell reads heads x L x P places near itself; where and how much of each follows from the cell."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.offsets = nn.Linear(width, heads * LEVELS * POINTS * 2)
        self.weights = nn.Linear(width, heads * LEVELS * POINTS)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        for linear in (self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        # at first every head looks its own way, its points one to P cells far, all alike (Deformable DETR)
        angle = torch.arange(heads) * (2 * math.pi / heads)
        way = torch.stack((angle.cos(), angle.sin()), -1)
        way = way / way.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, POINTS + 1)[:, None] * way[:, None, None]
        with torch.no_grad():
            self.offsets.bias.copy_(steps.expand(-1, LEVELS, -1, -1).flatten())
        for zero in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(zero)

    def forward(self, query: Tensor, x: Tensor, centres: Tensor, grids: Grids, padding: Tensor) -> Tensor:
        """query, x float[B, S, D]; centres float[S, 2] in [0, 1]; padding bool[B, S] is never read."""
        value = self.value(x).masked_fill(padding[..., None], 0).unflatten(-1, (self.heads, -1)).float()
        shape = (self.heads, LEVELS, POINTS)
        offsets = self.offsets(query).float()
        weights = self.weights(query).unflatten(-1, (self.heads, -1)).float().softmax(-1)
        cells = torch.tensor([(w, h) for h, w in grids], device=x.device)[:, None]  # offsets count cells
        # in one row, as the offsets lie: a sum over pairs alone takes long on a CPU
        places = centres.repeat(1, math.prod(shape)) + offsets / cells.expand(*shape, 2).flatten()
        places = places.unflatten(-1, (*shape, 2))
        mixed: Tensor = self.out(attend(value, grids, places, weights.unflatten(-1, shape[1:])))
        return mixed


class _Layer(nn.Module):
    """Deformable self-attention and feed-forward, post-norm; positions join the queries, never the values."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention, self.norm1 = DeformableAttention(width, heads), nn.LayerNorm(width)
        self.ffn, self.norm2 = FeedForward(width, ffn), nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor, centres: Tensor, grids: Grids, padding: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x + positions, x, centres, grids, padding))
        return self.norm2(x + self.ffn(x))


class DeformablePixelDecoder(nn.Module):
    """Maps, finest first -> (mask features float[B, D, h0, w0], three levels, coarsest first).

    The three coarsest maps meet in the transformer; a finer one joins behind it, as in an FPN. `ffn` is the
    decoder's: the papers take half of it here (1024 beside 2048).
    """

    def __init__(self, channels: list[int], width: int, heads: int, ffn: int, layers: int) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.ModuleList(conv(c, width, 1, norm=True) for c in reversed(channels[-LEVELS:]))
        self.level_embed = nn.Embedding(LEVELS, width)
        self.encoder = nn.ModuleList(_Layer(width, heads, ffn // 2) for _ in range(layers))
        self.laterals = nn.ModuleList(conv(c, width, 1, norm=True) for c in reversed(channels[:-LEVELS]))
        self.outputs = nn.ModuleList(conv(width, width, 3, norm=True) for _ in self.laterals)
        self.mask_features = conv(width, width, 1, norm=False)

    def forward(self, features: list[Tensor], padding: Tensor) -> tuple[Tensor, list[Tensor]]:
        coarse = [enter(f) for enter, f in zip(self.enter, reversed(features[-LEVELS:]), strict=True)]
        levels = self._encode(coarse, padding)
        y = levels[-1]
        for feature, lateral, output in zip(
            reversed(features[:-LEVELS]), self.laterals, self.outputs, strict=True
        ):
            size = feature.shape[-2:]
            y = lateral(feature) + F.interpolate(y, size=size, mode="bilinear", align_corners=False)
            y = F.relu_(output(y))
        return self.mask_features(y), levels

    def _encode(self, maps: list[Tensor], padding: Tensor) -> list[Tensor]:
        """`padding` bool[B, H, W] of the input picture; a cell is padding where its nearest pixel is."""
        grids = [(m.shape[2], m.shape[3]) for m in maps]
        outside = [F.interpolate(padding[:, None].float(), size=grid)[:, 0] > 0.5 for grid in grids]
        positions = torch.cat(
            [
                sine_positions(o, self.width).flatten(1, 2) + level
                for o, level in zip(outside, self.level_embed.weight, strict=True)
            ],
            1,
        )
        x = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        centres = torch.cat([_centres(grid, x.device) for grid in grids])
        hidden = torch.cat([o.flatten(1) for o in outside], 1)
        for layer in self.encoder:
            x = layer(x, positions, centres, grids, hidden)
        parts = x.transpose(1, 2).split([h * w for h, w in grids], 2)
        return [part.unflatten(2, grid) for part, grid in zip(parts, grids, strict=True)]


def _centres(grid: tuple[int, int], device: torch.device) -> Tensor:
    """The middle of each cell as x, y in [0, 1], row by row: float[hw, 2]."""
    y, x = (((torch.arange(n, device=device) + 0.5) / n) for n in grid)
    return torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), -1).flatten(0, 1)
