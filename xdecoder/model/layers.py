"""Attention and feed-forward blocks, shared by the text encoder, the pixel decoder and the decoder.

Letters: `N` sequences, `S` their tokens, `M` tokens attended to, `D` width.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be projected once and used for many rows.

    query      float[N, S, D]
    keys       float[N, M, D], values float[N, M, D]: already projected by `project`
    blocked    bool, broadcast to [N, heads, S, M]; True where attention is forbidden, no row may be all True
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def project(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.key(keys), self.value(values)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, blocked: Tensor | None = None) -> Tensor:
        q, k, v = (self._split(x) for x in (self.query(query), keys, values))
        allowed = None if blocked is None else ~blocked
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Kept:
    """Projected keys and values that grow, for sequences written a step at a time, without gradients.

    Room for all of them is taken once: nothing is copied when some are added.
    """

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        """keys, values float[N, M, D] to begin with (M may be 0); `room` is how many may follow."""
        self._length = keys.shape[1]
        self._keys, self._values = (F.pad(x, (0, 0, 0, room)) for x in (keys, values))

    def add(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append float[N, n, D] each and return all there are."""
        start, self._length = self._length, self._length + keys.shape[1]
        self._keys[:, start : self._length], self._values[:, start : self._length] = keys, values
        return self._keys[:, : self._length], self._values[:, : self._length]


class FeedForward(nn.Sequential):
    """Linear, ReLU, linear: float[..., D] -> float[..., D]."""

    def __init__(self, width: int, hidden: int) -> None:
        inner, outer = nn.Linear(width, hidden), nn.Linear(hidden, width)
        super().__init__(inner, nn.ReLU(inplace=True), outer)
        for linear in (inner, outer):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)


class Mlp(nn.Sequential):
    """`layers` linears with ReLU between them, all of one width (mask_embed has three)."""

    def __init__(self, width: int, layers: int) -> None:
        parts: list[nn.Module] = []
        for i in range(layers):
            parts += [nn.Linear(width, width)] + ([nn.ReLU(inplace=True)] if i < layers - 1 else [])
        super().__init__(*parts)


def unit(x: Tensor) -> Tensor:
    """The direction of each row, in float32: float[..., D] -> float32[..., D]."""
    return F.normalize(x.float(), dim=-1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 also under autocast: a scale of 100 turns bfloat16's rounding of a cosine into other
    classes.
    """
    device = a.device.type
    known = torch.amp.is_autocast_available(device)  # meta has none
    with torch.autocast(device, enabled=False) if known else nullcontext():
        found: Tensor = a.float() @ b.float()
    return found


def matrix(inputs: int, outputs: int) -> nn.Linear:
    """A projection without bias, truncated normal 0.02 (X-Decoder, 1.5)."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    return linear


def sine_positions(padding: Tensor, width: int) -> Tensor:
    """2-D sine position encoding: bool[N, h, w] (True is padding) -> float32[N, h, w, width].

    Coordinates count the valid cells from 1 and are normalised to 2 pi by the last valid one, so padding does
    not move them; y then x; even channels sine, odd cosine (DETR; X-Decoder, 1.4).
    """
    half = width // 2
    frequency = 10000.0 ** (2 * (torch.arange(half, device=padding.device) // 2) / half)
    parts = []
    for axis in (1, 2):
        count = (~padding).cumsum(axis, dtype=torch.float32)
        last = count.amax(axis, keepdim=True)
        angle = (count / (last + 1e-6) * 2 * math.pi).unsqueeze(-1) / frequency
        parts.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), -1).flatten(-2))
    return torch.cat(parts, -1)
