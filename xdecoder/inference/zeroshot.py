"""Classes that never had a mask in training: calibration, and a second opinion of an image encoder.

As ZegFormer has it: the model groups segments and names them by their embedding; the image branch cuts each
segment out of the picture and compares it with the class names, as whole pictures are compared with captions.
Both are joined by class: the branch ranks unseen classes, and only scales the seen ones.

Letters: `Q` queries, `K` classes, `H W` pixels, `E` width of the image branch's embeddings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from schemas.jobs import Prompts, ZeroShotConfig
from schemas.tasks import TASKS
from xdecoder.inference.postprocess import Frame
from xdecoder.model import backbone, clip
from xdecoder.model.layers import product, unit
from xdecoder.model.xdecoder import ClassTexts, XDecoder

CLIP_CONTEXT = 77
REGIONS_AT_ONCE = 16  # of the image encoder: bounds memory, not results


@dataclass(frozen=True, kw_only=True)
class ImageBranch:
    """An image encoder with the text encoder it was trained with.

    encode_images    float32[N, 3, side, side] in [0, 1] -> float[N, E]
    encode_names     K class names -> unit float[K, E]
    scale            of the cosine
    blank            the colour that stands for nothing: zero once normalised
    """

    encode_images: Callable[[Tensor], Tensor]
    encode_names: Callable[[Sequence[str]], Tensor]
    scale: float
    side: int
    blank: tuple[float, float, float]


def own_branch(model: XDecoder, prompts: Prompts, side: int) -> ImageBranch:
    """The model's own image query, as retrieval uses it."""

    with torch.no_grad():
        task = model.text(model.task_ids).sentence[TASKS.index("retrieval")]

    def images(regions: Tensor) -> Tensor:
        rows = torch.arange(len(regions), device=regions.device)
        pixels = model.encode(regions, torch.zeros_like(regions[:, 0], dtype=torch.bool))
        return model.ask(pixels, "segmentation", rows, task.expand(len(rows), -1)).final.image

    def names(classes: Sequence[str]) -> Tensor:
        texts = ClassTexts.of(classes, model.config.context, prompts, no_object=None)
        return texts.embed(model.text(texts.ids.to(model.task_ids.device)).sentence)

    scale = float(model.scale())
    return ImageBranch(encode_images=images, encode_names=names, scale=scale, side=side, blank=backbone.MEAN)


def clip_branch(name: str, prompts: Prompts, device: str) -> ImageBranch:
    """A CLIP of open_clip, `MODEL/TAG`; its weights are fetched."""
    return branch_of(clip.load_clip(name).to(device), prompts)


def branch_of(model: Any, prompts: Prompts) -> ImageBranch:
    """Any open_clip model."""
    first = next(model.parameters())
    mean, std = (torch.tensor(x, device=first.device).view(3, 1, 1) for x in (clip.MEAN, clip.STD))

    def names(classes: Sequence[str]) -> Tensor:
        texts = ClassTexts.of(classes, CLIP_CONTEXT, prompts, no_object=None)
        padded = F.pad(texts.ids, (0, model.context_length - texts.ids.shape[1])).to(first.device)
        return texts.embed(model.encode_text(padded))

    size = model.visual.image_size
    return ImageBranch(
        encode_images=lambda regions: model.encode_image((regions - mean) / std),
        encode_names=names,
        scale=float(model.logit_scale.exp()),
        side=size[0] if isinstance(size, tuple) else int(size),
        blank=clip.MEAN,
    )


def tight_boxes(masks: Tensor) -> Tensor:
    """bool[Q, H, W] -> x0, y0, x1, y1 float[Q, 4], the last index that is inside, as the original has it.

    The whole picture where the mask is empty, or so thin that its box has no area (ZegFormer, 3.3).
    """
    height, width = masks.shape[1:]
    ends = []
    for inside, size in ((masks.any(1), width), (masks.any(2), height)):
        first = inside.int().argmax(1)
        ends.append((first, size - 1 - inside.flip(1).int().argmax(1)))
    (left, right), (top, bottom) = ends
    boxes = torch.stack((left, top, right, bottom), 1).float()
    flat = (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1]) | ~masks.flatten(1).any(1)
    boxes[flat] = torch.tensor([0.0, 0.0, width, height], device=boxes.device)
    return boxes


def cut(image: Tensor, masks: Tensor, how: str, side: int, blank: Sequence[float]) -> Tensor:
    """What the encoder sees of each segment: float32[3, H, W], bool[Q, H, W] -> float32[Q, 3, side, side].

    mask: the picture with everything else blank; crop: the tight box, nothing blank; cropmask: both.
    """
    empty = image.new_tensor(blank).view(3, 1, 1)
    pictures = image[None].expand(len(masks), -1, -1, -1)
    if how != "crop":
        pictures = torch.where(masks[:, None], pictures, empty)
    if how == "mask":
        return F.interpolate(pictures, size=(side, side), mode="bilinear", align_corners=False)
    rows = torch.arange(len(masks), device=image.device)[:, None]
    found: Tensor = roi_align(pictures, torch.cat((rows, tight_boxes(masks)), 1), (side, side), aligned=True)
    return found


def ensemble(segments: Tensor, pictures: Tensor, seen: Tensor, weight: float) -> Tensor:
    """p of the segment embeddings, p' of the image branch, float[Q, K] both -> float[Q, K] (ZegFormer, 3.4).

    seen bool[K]: p^w (mean of p' over seen)^(1 - w), as the branch may not rank them; unseen: p^(1 - w) p'^w.
    Not normalised.
    """
    if not seen.any():
        return segments ** (1 - weight) * pictures**weight
    common = pictures[:, seen].mean(1, keepdim=True)
    return torch.where(
        seen,
        segments**weight * common ** (1 - weight),
        segments ** (1 - weight) * pictures**weight,
    )


class ZeroShot:
    """What a `Predictor` asks about classes of which some are unseen."""

    def __init__(self, config: ZeroShotConfig, branch: ImageBranch | None) -> None:
        self.config, self.branch = config, branch
        self._names: dict[tuple[str, ...], Tensor] = {}

    @classmethod
    def of(cls, config: ZeroShotConfig, model: XDecoder, side: int) -> "ZeroShot":
        """`side` is that of pictures in the model's image-text training."""
        if config.regions == "off":
            return cls(config, None)
        if config.encoder:
            return cls(config, clip_branch(config.encoder, config.prompts, str(model.task_ids.device)))
        if not model.config.text_queries:
            raise ValueError("this model has no image embedding of its own: set evaluate.zeroshot.encoder")
        return cls(config, own_branch(model, config.prompts, side))

    def handicap(self, seen: Tensor) -> Tensor:
        """What `postprocess.semantic` takes from each class: float[K]."""
        return self.config.gamma * seen.float()

    @torch.no_grad()
    def probabilities(
        self, logits: Tensor, image: Tensor, masks: Tensor, frame: Frame, names: Sequence[str], seen: Tensor
    ) -> Tensor:
        """Class probabilities of one picture's segments.

        logits float[Q, K + 1], no-object last; image float32[3, *frame.valid] in [0, 1]; masks float[Q, h, w]
        logits; seen bool[K] -> float[Q, K + 1]
        """
        probs = logits.softmax(-1)
        if self.branch is None:
            return probs
        height, width = frame.valid
        large = F.interpolate(masks[None].float(), size=frame.padded, mode="bilinear", align_corners=False)
        inside = large[0, :, :height, :width] > 0
        looks = torch.cat([self._embed(image, part) for part in inside.split(REGIONS_AT_ONCE)])
        similar = product(self.branch.scale * unit(looks), self._texts(tuple(names)).T)
        pictures = torch.cat((similar, logits[:, -1:]), 1).softmax(-1)  # both share the no-object logit
        joined = ensemble(probs[:, :-1], pictures[:, :-1], seen, self.config.weight)
        return torch.cat((joined, probs[:, -1:]), 1)

    def _embed(self, image: Tensor, masks: Tensor) -> Tensor:
        assert self.branch is not None
        return self.branch.encode_images(
            cut(image, masks, self.config.regions, self.branch.side, self.branch.blank)
        )

    def _texts(self, names: tuple[str, ...]) -> Tensor:
        assert self.branch is not None
        if names not in self._names:
            self._names[names] = self.branch.encode_names(names)
        return self._names[names]
