"""The pyramid to one width: FPN with a transformer encoder on the coarsest map (X-Decoder, 1.3).

Letters: `B` images, `D` width, `h w` a level's grid.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from xdecoder.model.layers import Attention, FeedForward, sine_positions


class _EncoderLayer(nn.Module):
    """Post-norm self-attention and feed-forward; positions join queries and keys, never values."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(width, heads), nn.LayerNorm(width)
        self.ffn, self.norm2 = FeedForward(width, ffn), nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor, blocked: Tensor) -> Tensor:
        placed = x + positions
        x = self.norm1(x + self.attention(placed, *self.attention.project(placed, x), blocked))
        return self.norm2(x + self.ffn(x))


def conv(inputs: int, outputs: int, size: int, *, norm: bool) -> nn.Sequential:
    """A convolution that keeps the grid, Kaiming-uniform with a = 1, then GroupNorm(32) where asked for."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=not norm)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(32, outputs)) if norm else nn.Sequential(conv)


class PixelDecoder(nn.Module):
    """Maps, finest first -> (mask features float[B, D, h0, w0], three levels, coarsest first).

    The finest map carries the mask features, the decoder attends to the three coarsest: of four maps
    (X-Decoder) these differ, of three the finest does both. Without a transformer the FPN reads the coarsest
    map itself, and the decoder its projection (MaskFormer, 2.2).
    """

    def __init__(self, channels: list[int], width: int, heads: int, ffn: int, layers: int) -> None:
        super().__init__()
        self.width = width
        self.enter = conv(channels[-1], width, 1, norm=False)
        self.encoder = nn.ModuleList(_EncoderLayer(width, heads, ffn) for _ in range(layers))
        self.laterals = nn.ModuleList(conv(c, width, 1, norm=True) for c in reversed(channels[:-1]))
        read = [width if layers else channels[-1], *(width for _ in self.laterals)]
        self.outputs = nn.ModuleList(conv(c, width, 3, norm=True) for c in read)
        self.mask_features = conv(width, width, 3, norm=False)

    def forward(self, features: list[Tensor], padding: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self._encode(self.enter(features[-1]), padding)
        y = F.relu_(self.outputs[0](x if self.encoder else features[-1]))
        levels = [y if self.encoder else x]
        for feature, lateral, output in zip(
            reversed(features[:-1]), self.laterals, self.outputs[1:], strict=True
        ):
            y = lateral(feature) + F.interpolate(y, size=feature.shape[-2:], mode="nearest")
            y = F.relu_(output(y))
            levels.append(y)
        return self.mask_features(y), levels[:3]

    def _encode(self, x: Tensor, padding: Tensor) -> Tensor:
        """`padding` bool[B, H, W] of the input picture; a cell is padding where its nearest pixel is."""
        outside = F.interpolate(padding[:, None].float(), size=x.shape[-2:], mode="nearest")[:, 0] > 0.5
        positions = sine_positions(outside, self.width).flatten(1, 2)
        blocked = outside.flatten(1)[:, None, None]
        tokens = x.flatten(2).transpose(1, 2)
        for layer in self.encoder:
            tokens = layer(tokens, positions, blocked)
        return tokens.transpose(1, 2).unflatten(2, x.shape[-2:])
