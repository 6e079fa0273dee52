"""FocalNet as the released weights of X-Decoder know it (X-Decoder, 1.2).

timm's has no depthwise convolutions beside its branches, pads its stem differently and gives its maps without
norms of their own. Parameters carry the names of the released weights.

Letters: `B` images, `h w` a stage's grid, `C` channels of a stage.
"""

from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F


class FocalNet(nn.Module):
    """float32[B, 3, H, W] -> maps float32[B, C_i, H / stride_i, W / stride_i] of the stages `out_indices`.

    depthwise      Focal-T: depthwise convolutions beside the branches, norms behind the sums; else Focal-L
    focal_levels   context convolutions of each stage, whose sides are focal_windows, + 2, + 4 ...
    drop_path      of the last block; it grows linearly from 0
    """

    def __init__(
        self,
        *,
        depthwise: bool,
        out_indices: Sequence[int],
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        focal_levels: Sequence[int] = (3, 3, 3, 3),
        focal_windows: Sequence[int] = (3, 3, 3, 3),
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(depths) == len(focal_levels) == len(focal_windows) > max(out_indices):
            raise ValueError(
                f"depths {list(depths)}, focal_levels {list(focal_levels)} and focal_windows "
                f"{list(focal_windows)} must be of the same stages, out_indices {list(out_indices)} of some"
            )
        self.out_indices = tuple(out_indices)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        self.channels = [widths[i] for i in out_indices]
        self.strides = [4 * 2**i for i in out_indices]
        self.patch_embed = _Shrink(3, embed_dim, kernel=7, stride=4)
        drops = torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))
        self.layers = nn.ModuleList(
            _Stage(width, drop.tolist(), levels, window, depthwise=depthwise, last=width == widths[-1])
            for width, drop, levels, window in zip(widths, drops, focal_levels, focal_windows, strict=True)
        )
        for i in out_indices:
            self.add_module(f"norm{i}", nn.LayerNorm(widths[i]))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        x = self.patch_embed(images.permute(0, 2, 3, 1))
        for i, stage in enumerate(self.layers):
            done, x = stage(x)  # the next stage takes the map before this norm
            if i in self.out_indices:
                maps.append(self.get_submodule(f"norm{i}")(done).permute(0, 3, 1, 2).contiguous())
        return maps


class _Stage(nn.Module):
    """Blocks, then a smaller grid: float[B, h, w, C] -> the map, and what the next stage starts with."""

    def __init__(
        self, width: int, drops: list[float], levels: int, window: int, *, depthwise: bool, last: bool
    ) -> None:
        super().__init__()
        block = _DepthwiseBlock if depthwise else _Block
        self.blocks = nn.Sequential(*(block(width, levels, window, drop) for drop in drops))
        self.downsample = nn.Identity() if last else _Shrink(width, 2 * width, kernel=3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.blocks(x)
        return x, self.downsample(x)


class _Shrink(nn.Module):
    """Overlapping strided convolution, then a norm: float[B, h, w, C] -> float[B, h', w', C']."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(_on_channels(self.proj, x))


class _Block(nn.Module):
    """Modulation and feed-forward, normalised and scaled on their branches (Focal-L): float[B, h, w, C]."""

    def __init__(self, width: int, levels: int, window: int, drop: float) -> None:
        super().__init__()
        self.modulation = _Modulation(width, levels, window)
        self.mlp = _Mlp(width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((width,), 1e-4)) for _ in range(2))
        self.drop = DropPath(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.gamma_1 * self.norm1(self.modulation(x)))
        return x + self.drop(self.gamma_2 * self.norm2(self.mlp(x)))


class _DepthwiseBlock(_Block):
    """The same with a depthwise convolution before each branch, and the norms behind the sums (Focal-T)."""

    def __init__(self, width: int, levels: int, window: int, drop: float) -> None:
        super().__init__(width, levels, window, drop)
        self.dw1, self.dw2 = (nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + _on_channels(self.dw1, x)
        x = self.norm1(x + self.drop(self.gamma_1 * self.modulation(x)))
        x = x + _on_channels(self.dw2, x)
        return self.norm2(x + self.drop(self.gamma_2 * self.mlp(x)))


class _Modulation(nn.Module):
    """Each place times what surrounds it, near and far, each distance through a gate: float[B, h, w, C]."""

    def __init__(self, width: int, levels: int, window: int) -> None:
        super().__init__()
        self.parts = (width, width, levels + 1)
        self.f, self.proj = nn.Linear(width, sum(self.parts)), nn.Linear(width, width)
        self.h = nn.Conv2d(width, width, 1)
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, k, padding=k // 2, groups=width, bias=False), nn.GELU())
            for k in range(window, window + 2 * levels, 2)
        )
        for linear in (self.f, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        query, context, gates = self.f(x).permute(0, 3, 1, 2).split(self.parts, 1)
        surroundings = torch.zeros_like(context)
        for layer, gate in zip(self.focal_layers, gates.split(1, 1), strict=False):
            context = layer(context)
            surroundings = surroundings + context * gate
        everywhere = F.gelu(context.mean((2, 3), keepdim=True))
        surroundings = (surroundings + everywhere * gates[:, -1:]) / self.parts[-1]
        return self.proj((query * self.h(surroundings)).permute(0, 2, 3, 1))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for linear in (self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def _on_channels(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of a map whose channels stand last."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
