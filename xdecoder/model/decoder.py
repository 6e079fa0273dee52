"""The generalized decoder: queries of four kinds look at the picture and at one another, and tell masks and
meanings.

A *request* is one image with one task; the same image may stand in several requests, which share its
features. Who attends to whom is the table `PATTERNS` below. What the answers are used for is not decided
here.

Letters: `B` images, `R` requests, `O` latents, `T` text tokens, `S` all queries of a request, `D` width,
`h w` a level's grid, `L` decoder layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.jobs import ModelConfig
from xdecoder.model.layers import Attention, FeedForward, Mlp, matrix, sine_positions
from xdecoder.model.text import TextFeatures

Kind = Literal["latent", "image", "task", "text"]
PatternName = Literal["segmentation", "referring", "captioning", "vqa"]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Who attends to whom in self-attention, and how text queries behave.

    sees       for each kind of query, the kinds it attends to
    causal     a text query sees only text queries before it
    looks      text queries attend to the picture
    ordered    text queries carry the learned caption positions
    """

    sees: Mapping[Kind, tuple[Kind, ...]]
    causal: bool = False
    looks: bool = False
    ordered: bool = False


# The attention table. Latents never see the image query or a caption, so one picture's masks do not depend on
# what is said about it; a referring phrase is meant to change them. (X-Decoder 2.1, with OneFormer's task
# token among the latents. VQA reads its whole question at once, as the paper says and the released code does
# not.)
PATTERNS: dict[PatternName, Pattern] = {
    "segmentation": Pattern(
        sees={
            "latent": ("latent", "task"),
            "image": ("image", "task"),
            "task": ("latent", "task"),
            "text": (),
        }
    ),
    "referring": Pattern(
        sees={
            "latent": ("latent", "task", "text"),
            "image": ("image", "task"),
            "task": ("latent", "task"),
            "text": ("latent", "task", "text"),
        }
    ),
    "captioning": Pattern(
        sees={
            "latent": ("latent", "task"),
            "image": ("image", "task"),
            "task": ("latent", "task"),
            "text": ("latent", "image", "task", "text"),
        },
        causal=True,
        looks=True,
        ordered=True,
    ),
    "vqa": Pattern(
        sees={
            "latent": ("latent", "task"),
            "image": ("image", "task"),
            "task": ("latent", "task"),
            "text": ("latent", "image", "task", "text"),
        },
        looks=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Level:
    """One map of the pyramid, flattened: what the cross-attention of a layer needs of it.

    grid           h and w
    memory         float[B, hw, D], values before projection;  positions  float[B, hw, D], added to the keys
    padding        bool[B, hw];  mask_features  float[B, D, hw], resized from the finest map
    """

    grid: tuple[int, int]
    memory: Tensor
    positions: Tensor
    padding: Tensor
    mask_features: Tensor


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """What the picture side knows of B images.

    mask_features   float[B, D, h0, w0]
    levels          what the decoder's layers look at in turn, coarsest first
    pooled          float[B, C], the backbone's coarsest map, averaged over the picture
    """

    mask_features: Tensor
    levels: tuple[Level, ...]
    pooled: Tensor


@dataclass(frozen=True, kw_only=True)
class Request:
    """R requests of one pattern.

    images      int64[R], which image of the batch each is about
    task        float[R, D], the sentence embedding of its task; None in a model without task tokens
    text        the text queries, R of them; None where the pattern has none
    """

    pattern: PatternName
    images: Tensor
    task: Tensor | None
    text: TextFeatures | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the queries say after one layer (or before the first).

    semantic      float[R, O, D], the meaning of each latent as a sentence embedding, not normalised
    image         float[R, D], the meaning of the whole picture
    mask_embed    float[R, O, D]; its product with the mask features is the mask logit
    text          float[R, T, D], the text queries after normalisation
    """

    semantic: Tensor
    image: Tensor
    mask_embed: Tensor
    text: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Predictions before the first layer and after every layer (the last is final), for R requests.

    initial    float[R, O + 1, D], the latents and the task token before the decoder; None without task tokens
    """

    predictions: tuple[Prediction, ...]
    images: Tensor
    initial: Tensor | None

    @property
    def final(self) -> Prediction:
        return self.predictions[-1]


class _Layer(nn.Module):
    """Cross-attention, self-attention, feed-forward; each residual and normalised after."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.cross, self.norm1 = Attention(width, heads), nn.LayerNorm(width)
        self.self, self.norm2 = Attention(width, heads), nn.LayerNorm(width)
        self.ffn, self.norm3 = FeedForward(width, ffn), nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        level: Level,
        images: Tensor,
        outside: Tensor,
        deaf: Tensor | None = None,
    ) -> Tensor:
        """x, position float[R, S, D]; the first n queries look, n being the rows of `outside`.

        outside bool[R, 1, n, hw] and deaf bool[R or 1, 1, S, S] forbid looking and talking where True
        """
        looking = outside.shape[2]
        seen = self._look(x[:, :looking], position[:, :looking], level, images, outside)
        return self._talk(torch.cat((seen, x[:, looking:]), 1), position, deaf)

    def _look(self, x: Tensor, position: Tensor, level: Level, images: Tensor, outside: Tensor) -> Tensor:
        keys, values = self.cross.project(level.memory + level.positions, level.memory)  # once an image
        rows = (keys.index_select(0, images), values.index_select(0, images))
        return self.norm1(x + self.cross(x + position, *rows, outside))

    def _talk(self, x: Tensor, position: Tensor, deaf: Tensor | None) -> Tensor:
        placed = x + position
        x = self.norm2(x + self.self(placed, *self.self.project(placed, x), deaf))
        return self.norm3(x + self.ffn(x))


class _QueryInit(nn.Module):
    """Task-guided queries: the task token, repeated, looks at the picture (OneFormer, 1.6).

    The original swaps positions and features, so its values hold no picture; here values are the features.
    Memory is the finest level of the decoder instead of the mask features: four times fewer keys, chosen by
    us.
    """

    def __init__(self, width: int, heads: int, ffn: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, heads, ffn) for _ in range(layers))

    def forward(self, task: Tensor, position: Tensor, level: Level, images: Tensor) -> Tensor:
        x = task[:, None].expand(-1, position.shape[-2], -1)
        outside = level.padding[images][:, None, None].expand(-1, -1, x.shape[1], -1)
        for layer in self.layers:
            x = layer(x, position, level, images, outside)
        return x


class _MaskPooling(nn.Module):
    """The features under a mask, averaged: float[R, O, hw] in [0, 1], float[R, hw, D] -> float[R, O, D].

    In the papers a query learns what is under its mask by attention alone; pooling says it from the first
    step (OpenSeg, 2022, names segments by it alone).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, shares: Tensor, memory: Tensor) -> Tensor:
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-3)
        pooled: Tensor = self.norm(self.project(shares @ memory))
        return pooled


class Decoder(nn.Module):
    """Answers requests about encoded images."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads = config.width, config.heads
        self.latents, self.masked, self.looked_at = (
            config.latents,
            config.masked_attention,
            config.decoder_levels,
        )
        self.positions = nn.Embedding(config.latents + 2, width)  # latents, image query, task token
        self.contents = nn.Embedding(config.latents + 1, width)  # latents, image query
        if config.text_queries:
            self.caption_positions = nn.Embedding(config.context, width)
        self.level_embed = nn.Embedding(3, width)
        self.layers = nn.ModuleList(_Layer(width, heads, config.ffn) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.class_embed = _class_embed(config)
        self.mask_embed = Mlp(width, 3)
        self.pooling = _MaskPooling(width) if config.mask_pooling else None
        self.task_mlp: nn.Module | None = None
        if config.task_tokens:
            self.task_mlp = Mlp(width, 2)
            self.query_init = _QueryInit(width, heads, config.ffn, config.init_layers)

    def forward(self, pixels: Pixels, request: Request) -> Outputs:
        pattern = PATTERNS[request.pattern]
        x, position, initial = self._queries(request, pattern, pixels.levels[-1])
        deaf = self._self_mask(pattern, request, x)
        silent = 0 if pattern.looks or request.text is None else request.text.tokens.shape[1]
        looking = x.shape[1] - silent
        memory = pixels.levels[-1].memory.index_select(0, request.images)  # once a request, not once a layer
        predictions = [self._predict(x, request, pixels, memory)]
        for i, layer in enumerate(self.layers):
            level = pixels.levels[i % self.looked_at]
            outside = self._cross_mask(predictions[-1], level, request.images, looking)
            x = layer(x, position, level, request.images, outside, deaf)
            predictions.append(self._predict(x, request, pixels, memory))
        return Outputs(predictions=tuple(predictions), images=request.images, initial=initial)

    def name_regions(self, pixels: Pixels, images: Tensor, masks: Tensor) -> Tensor:
        """The meaning of given regions by their looks alone.

        float[R, M, H, W], masks over images int64[R] of the batch -> float[R, M, D]
        Raises `RuntimeError` in a model without mask pooling.
        """
        if self.pooling is None:
            raise RuntimeError("regions are named by mask pooling, and model.mask_pooling is off")
        level = pixels.levels[-1]
        each = F.interpolate(masks.float().flatten(0, 1)[:, None], size=level.grid, mode="area")
        shares = each.flatten(1).unflatten(0, masks.shape[:2])
        meaning: Tensor = self.class_embed(self.pooling(shares, level.memory.index_select(0, images)))
        return meaning

    def name_pixels(self, pixels: Pixels, images: Tensor) -> Tensor:
        """The meaning of every cell of the mask features by itself, float[R, h0, w0, D]."""
        meaning: Tensor = self.class_embed(pixels.mask_features.permute(0, 2, 3, 1).index_select(0, images))
        return meaning

    def level(self, index: int, feature: Tensor, mask_features: Tensor, padding: Tensor) -> Level:
        """Flatten map `index` float[B, D, h, w] of a picture batch with padding bool[B, H, W]."""
        size = feature.shape[-2:]
        padding = F.interpolate(padding[:, None].float(), size=size, mode="nearest")[:, 0] > 0.5
        with (
            torch.no_grad()
        ):  # a resized product is a product with resized features: masks per level cost little
            small = F.interpolate(mask_features.float(), size=size, mode="bilinear", antialias=True)
        return Level(
            grid=(size[0], size[1]),
            memory=(feature + self.level_embed.weight[index][:, None, None]).flatten(2).transpose(1, 2),
            positions=sine_positions(padding, feature.shape[1]).flatten(1, 2),
            padding=padding.flatten(1),
            mask_features=small.flatten(2),
        )

    def _queries(
        self, request: Request, pattern: Pattern, level: Level
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Content and position of all queries, float[R, S, D] each, in the order latent, image, task,
        text.
        """
        rows, count = len(request.images), self.latents
        places = self.positions.weight.expand(rows, -1, -1)
        latents, image = self.contents.weight.split((count, 1))
        initial = None
        if self.task_mlp is not None and request.task is not None:
            task = self.norm(self.task_mlp(request.task))  # OneFormer shares this norm with the heads
            started = self.query_init(task, places[:, :count], level, request.images)
            initial = torch.cat((started, task[:, None]), 1)
            content = torch.cat((started, image.expand(rows, -1, -1), task[:, None]), 1)
            position = places
        else:
            content = torch.cat((latents, image)).expand(rows, -1, -1)
            position = places[:, : count + 1]
        if request.text is not None:
            tokens = request.text.tokens
            ordered = self.caption_positions.weight[: tokens.shape[1]] if pattern.ordered else 0
            content = torch.cat(
                (content, tokens.detach()), 1
            )  # meaning flows back through the position alone
            position = torch.cat((position, tokens + ordered), 1)
        return content, position, initial

    def _kinds(self, size: int) -> list[Kind]:
        task = int(self.task_mlp is not None)
        text = size - self.latents - 1 - task
        counts: list[tuple[Kind, int]] = [
            ("latent", self.latents),
            ("image", 1),
            ("task", task),
            ("text", text),
        ]
        return [kind for kind, count in counts for _ in range(count)]

    def _self_mask(self, pattern: Pattern, request: Request, x: Tensor) -> Tensor:
        """bool[R or 1, 1, S, S], True where query s may not attend to query s'; every query may attend to
        itself.
        """
        kinds = self._kinds(x.shape[1])
        allowed = torch.tensor(
            [[column in pattern.sees[row] for column in kinds] for row in kinds], device=x.device
        )
        if request.text is None:
            return ~allowed[None, None]
        if pattern.causal:
            first = kinds.index("text")
            allowed[first:, first:] = allowed[first:, first:].tril()
        allowed = allowed.expand(len(x), -1, -1).clone()
        allowed[:, :, -request.text.padding.shape[1] :] &= ~request.text.padding[:, None]
        allowed |= torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        return ~allowed[:, None]

    @torch.no_grad()
    def _cross_mask(self, prediction: Prediction, level: Level, images: Tensor, looking: int) -> Tensor:
        """bool[R, 1, looking, hw]: latents look where their mask is, all others at the whole picture; all do
        without masked attention.

        The original clears the wrong row for its image query (off by one); ours looks everywhere, as it was
        meant to.
        """
        padding = level.padding[images][:, None]
        if not self.masked:
            return padding.expand(-1, looking, -1)[:, None]
        outside = prediction.mask_embed @ level.mask_features[images] < 0  # sigmoid below one half
        outside = outside | padding
        outside &= ~outside.all(-1, keepdim=True)  # a latent that sees nothing sees everything
        rest = padding.expand(-1, looking - self.latents, -1)
        return torch.cat((outside | padding, rest), 1)[:, None]

    def _predict(self, x: Tensor, request: Request, pixels: Pixels, memory: Tensor) -> Prediction:
        """`memory` float[R, hw, D], the finest level's, a row for each request."""
        z = self.norm(x)
        latents = z[:, : self.latents]
        image = _pool(z[:, self.latents], latents)
        mask_embed = self.mask_embed(latents)
        named = latents
        if self.pooling is not None:
            named = latents + self.pooling(_shares(mask_embed, pixels.levels[-1], request.images), memory)
        meaning = self.class_embed(torch.cat((named, image[:, None]), 1))
        text = None if request.text is None else z[:, -request.text.tokens.shape[1] :]
        return Prediction(semantic=meaning[:, :-1], image=meaning[:, -1], mask_embed=mask_embed, text=text)


def _class_embed(config: ModelConfig) -> nn.Module:
    """From a query to what its class is told by: a meaning to compare with texts, logits of a closed list and
    no-object, or nothing where latent k is class k.
    """
    if config.output == "latents":
        return nn.Identity()
    if config.classes:
        return nn.Linear(config.width, config.classes + 1)
    return matrix(config.width, config.text_width)


@torch.no_grad()
def _shares(mask_embed: Tensor, level: Level, images: Tensor) -> Tensor:
    """How much each cell of a level belongs to each mask, float[R, O, hw] in [0, 1]; padding to none."""
    inside = ~level.padding[images][:, None]
    return (mask_embed @ level.mask_features[images]).sigmoid() * inside


def _pool(image: Tensor, latents: Tensor) -> Tensor:
    """The image query gathers the latents most like it: float[R, D], float[R, O, D] -> float[R, D]
    (X-Decoder, 2.0).
    """
    similarity = F.normalize(latents, dim=-1) @ F.normalize(image, dim=-1)[..., None]
    return (similarity.softmax(1) * latents).sum(1)
