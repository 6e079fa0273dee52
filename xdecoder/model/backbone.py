"""Images to a pyramid of features: any timm model that offers `features_only`.

Letters: `B` images, `H W` pixels, `C` channels of a level.
"""

import timm
import torch
from timm.layers import Format
from torch import Tensor, nn

from schemas.jobs import BackboneConfig

# ImageNet statistics in [0, 1]; X-Decoder states the same times 255.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """float32[B, 3, H, W] in [0, 1] -> maps float32[B, C_i, H / stride_i, W / stride_i], finest first.

    Raises `ValueError` where timm knows no model of that name.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        if not timm.is_model(config.name):
            near = timm.list_models(f"*{config.name.split('_')[0]}*")[:8]
            raise ValueError(f"backbone {config.name!r} is no timm model; near: {near}")
        self.body = timm.create_model(
            config.name,
            pretrained=config.pretrained,
            features_only=True,
            out_indices=config.out_indices,
            **config.options,
        )
        self.channels: list[int] = self.body.feature_info.channels()
        self.strides: list[int] = self.body.feature_info.reduction()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body((images - self.mean) / self.std)
        return [self._channels_first(m) for m in maps]

    def _channels_first(self, feature: Tensor) -> Tensor:
        """timm's Swin gives [B, h, w, C]."""
        return feature.permute(0, 3, 1, 2) if self.body.output_fmt == Format.NHWC else feature
