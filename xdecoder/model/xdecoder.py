"""The model: pictures are encoded once, then asked as many requests as one likes.

Letters: `B` images, `R` requests, `O` latents, `K` concepts (class names or phrases), `D` width, `N` texts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.jobs import NO_OBJECT, ModelConfig
from schemas.tasks import TASKS
from xdecoder.model.backbone import Backbone
from xdecoder.model.clip import clip_text
from xdecoder.model.decoder import Decoder, Outputs, PatternName, Pixels, Prediction, Request, join
from xdecoder.model.deformable import DeformablePixelDecoder
from xdecoder.model.layers import Mlp, matrix, product, unit
from xdecoder.model.pixel_decoder import PixelDecoder
from xdecoder.model.text import TextEncoder, TextFeatures, Wordless
from xdecoder.prompts import synonyms, task_prompt, tokenize

INITIAL_SCALE = (
    2.6592  # ln(1 / 0.07), as CLIP; the original starts at 1.0 because pretrained weights overwrite it
)
MAX_SCALE = 100.0
PIXEL_DECODERS: Mapping[str, type[PixelDecoder] | type[DeformablePixelDecoder]] = {
    "fpn": PixelDecoder,
    "deformable": DeformablePixelDecoder,
}


class XDecoder(nn.Module):
    """Backbone, pixel decoder, text encoder and decoder, with the scale that all similarities share."""

    task_ids: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone)
        self.pixel_decoder = PIXEL_DECODERS[config.pixel_decoder](
            self.backbone.channels, config.width, config.heads, config.ffn, config.encoder_layers
        )
        self.text = (
            TextEncoder(config.text_width, config.text, padding_counts=config.quirks.padding_counts)
            if config.text
            else Wordless()
        )
        self.decoder = Decoder(config)
        if config.text_queries:
            self.caption_embed = matrix(config.width, config.width)
            self.pooled_embed = matrix(self.backbone.channels[-1], config.width)
        if config.text_queries or not config.classes:
            self.log_scale = nn.Parameter(torch.tensor(INITIAL_SCALE))
        if config.no_object is None:
            bound = config.text_width**-0.5  # length about 0.58 (ZegFormer, 3.1)
            self.no_object = nn.Parameter(torch.empty(config.text_width).uniform_(-bound, bound))
        if config.task_tokens:
            self.query_text_mlp = Mlp(config.width, 2)
            self.query_text_context = nn.Embedding(config.text_contexts, config.width)
            self.query_text_scale = nn.Parameter(torch.tensor(INITIAL_SCALE))
        prompts = tokenize([task_prompt(task) for task in TASKS], config.context)
        self.register_buffer("task_ids", prompts, persistent=False)
        if config.text and config.text.clip:
            self.text.load_state_dict(clip_text(config.text.clip))
        if config.text and config.text.frozen:
            self.text.requires_grad_(False)

    @property
    def stride(self) -> int:
        """Sides of a batch must be multiples of it."""
        return self.backbone.strides[-1]

    def encode(self, images: Tensor, padding: Tensor) -> Pixels:
        """float32[B, 3, H, W] in [0, 1], bool[B, H, W] (True is padding) -> features of the pictures.

        All are encoded on one canvas, as in training: convolutions and normalisation see what stands in the
        padding. Raises `ValueError` where H or W is no multiple of the backbone's coarsest stride.
        """
        if images.shape[-2] % self.stride or images.shape[-1] % self.stride:
            raise ValueError(
                f"images are {tuple(images.shape[-2:])}, both sides must be multiples of {self.stride}"
            )
        if self.config.quirks.padding_counts:  # as pixels of the mean colour
            images = torch.where(padding[:, None], self.backbone.mean, images)
            padding = torch.zeros_like(padding)
        features = self.backbone(images)
        mask_features, maps = self.pixel_decoder(features, padding)
        levels = tuple(self.decoder.level(i, m, mask_features, padding) for i, m in enumerate(maps))
        inside = 1 - F.interpolate(padding[:, None].float(), size=features[-1].shape[-2:], mode="nearest")
        pooled = (features[-1] * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
        return Pixels(mask_features=mask_features, levels=levels, pooled=pooled)

    def encode_each(self, images: Sequence[Tensor], padding: Sequence[Tensor]) -> Pixels:
        """Pictures on canvases of their own, float32[3, H_i, W_i] and bool[H_i, W_i] -> one batch of
        features.

        Each is encoded as it would be alone, whatever the backbone computes (borders, statistics and
        attention over the whole canvas), those on canvases of one size together; only the decoder sees the
        batch, and masks what is not a picture's own.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(tuple(image.shape), []).append(i)
        parts = [
            self.encode(torch.stack([images[i] for i in rows]), torch.stack([padding[i] for i in rows]))
            for rows in groups.values()
        ]
        order = [i for rows in groups.values() for i in rows]
        joined = join(parts)
        return joined if order == sorted(order) else joined.select(torch.tensor(order).argsort())

    def ask(
        self,
        pixels: Pixels,
        pattern: PatternName,
        images: Tensor,
        task: Tensor,
        text: TextFeatures | None = None,
    ) -> Outputs:
        """Decode R requests: `images` int64[R] into the batch, `task` float[R, D] the sentences of their
        tasks.
        """
        return self.decoder(pixels, Request(pattern=pattern, images=images, task=task, text=text))

    def masks(self, prediction: Prediction, pixels: Pixels, images: Tensor) -> Tensor:
        """Mask logits float[R, O, h0, w0] at the stride of the mask features."""
        return torch.einsum(
            "rod,rdhw->rohw", prediction.mask_embed, pixels.mask_features.index_select(0, images)
        )

    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=MAX_SCALE)

    def similarity(self, meaning: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosine: float[..., D] against float[K, D] -> logits float32[..., K]."""
        return product(self.scale() * unit(meaning), unit(texts).mT)

    def class_logits(self, meaning: Tensor, classes: Tensor) -> Tensor:
        """Meanings of queries float[..., D] -> logits of K classes and of none of them, float[..., K + 1].

        classes    what stands for each of the K + 1: sentences float[K + 1, D] of `class_texts` (K where none
                   of them is learned), or in a model with a closed list int64[K + 1] from `columns`
        """
        if self.config.classes:
            return meaning.index_select(-1, classes)
        if self.config.no_object is None:  # its length counts, unlike that of a text (ZegFormer, 3.1)
            none = product(self.scale() * unit(meaning), self.no_object)
            return torch.cat((self.similarity(meaning, classes), none[..., None]), -1)
        return self.similarity(meaning, classes)

    def class_texts(self, names: Sequence[str]) -> "ClassTexts":
        """The sentences that tell of these classes, and of none of them unless that is learned; none at all
        where the list is closed.
        """
        config = self.config
        if config.classes:
            return ClassTexts.of((), config.context, no_object=None)
        return ClassTexts.of(names, config.context, config.prompts, no_object=config.no_object)

    def pixel_logits(self, prediction: Prediction, pixels: Pixels, images: Tensor, classes: Tensor) -> Tensor:
        """Per-pixel classification: logits float[R, K, h0, w0] at the stride of the mask features."""
        return _PIXEL_LOGITS[self.config.output](self, prediction, pixels, images, classes)

    def pairs(
        self, prediction: Prediction, pixels: Pixels, images: Tensor, classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is decided upon: class probabilities float[R, O, K + 1] and mask logits float[R, O, h0, w0].

        Of per-pixel classification: K masks, the logarithm of each class's probability, so that the largest
        is the class of the pixel.
        """
        if self.config.output == "masks":
            probs = self.class_logits(prediction.semantic, classes).softmax(-1)
            return probs, self.masks(prediction, pixels, images)
        logits = self.pixel_logits(prediction, pixels, images, classes)
        count = logits.shape[1]
        sure = torch.eye(count, count + 1, device=logits.device)
        return sure.expand(logits.shape[0], -1, -1), logits.log_softmax(1)

    def encode_texts(self, texts: Sequence[str]) -> TextFeatures:
        """Any texts, for inference; training encodes all texts of a step in one pass
        (`TextEncoder.several`). Raises `ValueError` in a model whose queries cannot be words.
        """
        if not self.config.text_queries:
            raise ValueError("this model reads class names at most: model.text is null or of another width")
        return self.text(tokenize(texts, self.config.context).to(self.task_ids.device))

    def embed_pooled(self, pixels: Pixels) -> Tensor:
        """The backbone's own opinion of each picture, float[B, D], for retrieval."""
        return self.pooled_embed(pixels.pooled)

    def caption_logits(self, slots: Tensor, tokens: Tensor | None = None) -> Tensor:
        """float[..., D] of text queries -> float[..., C]: each slot's next token, among `tokens` int64[C] or
        all.
        """
        return self.text.token_logits(self.caption_embed(slots), tokens)


def _by_features(
    model: XDecoder, prediction: Prediction, pixels: Pixels, images: Tensor, classes: Tensor
) -> Tensor:
    """Each pixel's feature is classified alone (MaskFormer's PerPixelBaseline; with texts, SPNet)."""
    logits = model.class_logits(model.decoder.name_pixels(pixels, images), classes)
    return logits[..., :-1].permute(0, 3, 1, 2)


def _by_latents(
    model: XDecoder, prediction: Prediction, pixels: Pixels, images: Tensor, classes: Tensor
) -> Tensor:
    """The mask of latent k is the logit of class k (MaskFormer's PerPixelBaseline+)."""
    return model.masks(prediction, pixels, images).index_select(1, classes[:-1])


_PIXEL_LOGITS: Mapping[str, Callable[[XDecoder, Prediction, Pixels, Tensor, Tensor], Tensor]] = {
    "pixels": _by_features,
    "latents": _by_latents,
}


def columns(known: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Where a closed classifier of the `known` names keeps the wanted ones, then no-object: int64[K + 1].

    Raises `ValueError` for a name it does not know.
    """
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise ValueError(f"this model's class list is closed (model.classes): it does not know {unknown}")
    return torch.tensor([*(known.index(name) for name in wanted), len(known)])


@dataclass(frozen=True, kw_only=True)
class ClassTexts:
    """K class names, then the words for no object, as token ids int64[n, T]; a name takes a row for each of
    its synonyms in each prompt.
    """

    ids: Tensor
    rows: tuple[int, ...]

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        context: int,
        prompts: Sequence[str] = ("{}",),
        *,
        no_object: str | None = NO_OBJECT,
    ) -> "ClassTexts":
        """Without `no_object` the names alone, else `ValueError` where a class is called as no object is."""
        called = [synonyms(name) for name in names]
        taken = {text.casefold() for several in called for text in several}
        if no_object is not None and no_object.casefold() in taken:
            raise ValueError(
                f"no class can be called {no_object!r}, which means that nothing is there: rename it"
            )
        every = called if no_object is None else [*called, (no_object,)]
        groups = [[prompt.format(text) for text in several for prompt in prompts] for several in every]
        ids = tokenize([text for group in groups for text in group], context)
        return cls(ids=ids, rows=tuple(len(group) for group in groups))

    def embed(self, sentences: Tensor) -> Tensor:
        """Sentence embeddings float[n, D] of `ids` -> unit float[K + 1, D]; synonyms are averaged."""
        parts = unit(sentences).split(self.rows)
        return unit(torch.stack([part.mean(0) for part in parts]))
