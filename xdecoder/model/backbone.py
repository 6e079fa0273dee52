"""Images to a pyramid of features: any timm model that offers `features_only`, or X-Decoder's own FocalNets.

Letters: `B` images, `H W` pixels, `C` channels of a level.
"""

from functools import partial

import timm
import torch
from timm.layers import Format
from torch import Tensor, nn

from schemas.jobs import BackboneConfig
from xdecoder.model.focal import FocalNet

# ImageNet statistics in [0, 1]; X-Decoder states the same times 255.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OWN = {"focal": partial(FocalNet, depthwise=False), "focal_dw": partial(FocalNet, depthwise=True)}


class Backbone(nn.Module):
    """float32[B, 3, H, W] in [0, 1] -> maps float32[B, C_i, H / stride_i, W / stride_i], finest first.

    Raises `ValueError` where timm knows no model of that name.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.body, self.channels, self.strides = _body(config)
        self.channels_last = getattr(self.body, "output_fmt", None) == Format.NHWC  # timm's Swin
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.body((images - self.mean) / self.std)
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_last else list(maps)


def _body(config: BackboneConfig) -> tuple[nn.Module, list[int], list[int]]:
    """The network, and the channels and strides of its maps."""
    if config.name in OWN:
        own = OWN[config.name](out_indices=config.out_indices, **config.options)
        return own, own.channels, own.strides
    if not timm.is_model(config.name):
        near = timm.list_models(f"*{config.name.split('_')[0]}*")[:8]
        raise ValueError(f"backbone {config.name!r} is no timm model; near: {near}")
    body = timm.create_model(
        config.name,
        pretrained=config.pretrained,
        features_only=True,
        out_indices=config.out_indices,
        **config.options,
    )
    return body, body.feature_info.channels(), body.feature_info.reduction()
