"""The generalized decoder: queries of four kinds look at the picture and at one another, and tell masks and
meanings.

A *request* is one image with one task; the same image may stand in several requests, which share its
features. Who attends to whom is the table `PATTERNS` below. What the answers are used for is not decided
here.

Letters: `B` images, `R` requests, `O` latents, `T` text tokens, `S` all queries of a request, `D` width,
`h w` a level's grid, `L` decoder layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.jobs import ModelConfig
from xdecoder.model.layers import Attention, FeedForward, Kept, Mlp, matrix, sine_positions
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

    def select(self, images: Tensor) -> "Pixels":
        """The pictures int64[n] of the batch, in this order."""
        rows = images.to(self.pooled.device)
        return Pixels(
            mask_features=self.mask_features[rows],
            levels=tuple(
                Level(
                    grid=level.grid,
                    memory=level.memory[rows],
                    positions=level.positions[rows],
                    padding=level.padding[rows],
                    mask_features=level.mask_features[rows],
                )
                for level in self.levels
            ),
            pooled=self.pooled[rows],
        )


def join(parts: Sequence[Pixels]) -> Pixels:
    """Pictures that were encoded apart -> one batch: maps grow to the largest grid, what is added is
    padding.
    """
    if len(parts) == 1:
        return parts[0]
    return Pixels(
        mask_features=_cat([part.mask_features for part in parts]),
        levels=tuple(_join_levels(levels) for levels in zip(*(part.levels for part in parts), strict=True)),
        pooled=torch.cat([part.pooled for part in parts]),
    )


def _join_levels(levels: Sequence[Level]) -> Level:
    def joined(flat: list[Tensor]) -> Tensor:
        """float[B, hw, D] of every level, grown as maps and flattened again."""
        maps = [x.mT.unflatten(2, level.grid) for x, level in zip(flat, levels, strict=True)]
        return _cat(maps).flatten(2).mT

    small = _cat([level.mask_features.unflatten(2, level.grid) for level in levels])
    return Level(
        grid=(small.shape[2], small.shape[3]),
        memory=joined([level.memory for level in levels]),
        positions=joined([level.positions for level in levels]),
        padding=_cat([level.padding.unflatten(1, level.grid) for level in levels], fill=1).flatten(1),
        mask_features=small.flatten(2),
    )


def _cat(maps: Sequence[Tensor], fill: int = 0) -> Tensor:
    """Maps [B_i, ..., h_i, w_i] of different sizes -> [sum of B_i, ..., h, w], filled below and right."""
    height, width = (max(x.shape[axis] for x in maps) for axis in (-2, -1))
    return torch.cat([F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=fill) for x in maps])


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
    image_mask    float[R, D], the mask embedding of the image query, which only quirks ask for
    """

    semantic: Tensor
    image: Tensor
    mask_embed: Tensor
    text: Tensor | None
    image_mask: Tensor | None = None

    def with_image(self) -> "Prediction":
        """The image query as one more latent."""
        assert self.image_mask is not None, "image_mask is predicted where model.quirks ask for it"
        semantic = torch.cat((self.semantic, self.image[:, None]), 1)
        mask_embed = torch.cat((self.mask_embed, self.image_mask[:, None]), 1)
        return replace(self, semantic=semantic, mask_embed=mask_embed)


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


@dataclass(frozen=True, kw_only=True)
class Hearing:
    """What the words of R growing captions attend to in one layer.

    picture    keys and values float[R, hw, D], projected once; outside bool[R, 1, 1, hw]
    queries    the other queries, `others` of them, then the words so far
    """

    picture: tuple[Tensor, Tensor]
    outside: Tensor
    queries: Kept
    others: int


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
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x, position float[R, S, D]; the first n queries look, n being the rows of `outside`.

        outside bool[R, 1, n, hw] and deaf bool[R or 1, 1, S, S] forbid looking and talking where True.
        Returns the queries, and the keys and values by which they heard one another.
        """
        looking = outside.shape[2]
        seen = self._look(x[:, :looking], position[:, :looking], self.picture(level, images), outside)
        return self._talk(torch.cat((seen, x[:, looking:]), 1), position, deaf)

    def extend(self, x: Tensor, position: Tensor, hearing: Hearing, deaf: Tensor | None) -> Tensor:
        """New words of growing captions, float[R, n, D]; deaf bool[R, 1, n, M] of all that is heard."""
        seen = self._look(x, position, hearing.picture, hearing.outside)
        return self._talk(seen, position, deaf, hearing.queries)[0]

    def picture(self, level: Level, images: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a level, float[R, hw, D] each, projected once an image."""
        keys, values = self.cross.project(level.memory + level.positions, level.memory)
        return keys.index_select(0, images), values.index_select(0, images)

    def _look(self, x: Tensor, position: Tensor, picture: tuple[Tensor, Tensor], outside: Tensor) -> Tensor:
        return self.norm1(x + self.cross(x + position, *picture, outside))

    def _talk(
        self, x: Tensor, position: Tensor, deaf: Tensor | None, before: Kept | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        placed = x + position
        keys, values = self.self.project(placed, x)
        if before is not None:
            keys, values = before.add(keys, values)
        x = self.norm2(x + self.self(placed, keys, values, deaf))
        return self.norm3(x + self.ffn(x)), (keys, values)


class _QueryInit(nn.Module):
    """Task-guided queries: the task token, repeated, looks at the picture (OneFormer, 1.6).

    The original swaps positions and features, so its values hold no picture; here values are the features.
    Memory is the finest level of the decoder instead of the mask features: four times fewer keys, chosen by
    us. The layers are the decoder's, which look before they talk and end with a norm of their own; DETR's
    talk first, and share one more norm at the end.
    """

    def __init__(self, width: int, heads: int, ffn: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, heads, ffn) for _ in range(layers))

    def forward(self, task: Tensor, position: Tensor, level: Level, images: Tensor) -> Tensor:
        x = task[:, None].expand(-1, position.shape[-2], -1)
        outside = level.padding[images][:, None, None].expand(-1, -1, x.shape[1], -1)
        for layer in self.layers:
            x, _ = layer(x, position, level, images, outside)
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
        self.latents, self.quirks = config.latents, config.quirks
        self.masked, self.levels = config.masked_attention, config.decoder_levels
        # latents, image query, task token
        self.positions = nn.Embedding(config.latents + 1 + config.task_tokens, width)
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
        return self._decode(pixels, request)[0]

    def listen(
        self, pixels: Pixels, images: Tensor, task: Tensor, room: int, region: Tensor | None = None
    ) -> tuple[Hearing, ...]:
        """Decode what a caption is written from, once: nothing that is said of a picture changes it.

        images int64[R], task float[R, D] as in `Request`; room for so many words of each; region bool[R, H,
        W], the only part of the picture that the words look at (X-Decoder, 2.5). Returns one a layer.
        """
        _, heard = self._decode(pixels, Request(pattern="captioning", images=images, task=task))
        sees = PATTERNS["captioning"].sees["text"]
        heeded = [i for i, kind in enumerate(self._kinds(heard[0][0].shape[1])) if kind in sees]
        hearings = []
        for i, (layer, (keys, values)) in enumerate(zip(self.layers, heard, strict=True)):
            assert isinstance(layer, _Layer)
            level = self._looked_at(pixels, i)
            hearings.append(
                Hearing(
                    picture=layer.picture(level, images),
                    outside=self._outside(level, images, region)[:, None, None],
                    queries=Kept(keys[:, heeded], values[:, heeded], room),
                    others=len(heeded),
                )
            )
        return tuple(hearings)

    def extend(self, words: Tensor, place: int, hearings: Sequence[Hearing], deaf: Tensor | None) -> Tensor:
        """Words at `place` of growing captions: tokens float[R, n, D] -> text queries float[R, n, D],
        normalised.

        hearings   from `listen`; hold the words of earlier calls, and keep these
        deaf       bool[R, 1, n, M], which of all M words so far do not stand in front; None where all do
        """
        x, position = words, words + self.caption_positions.weight[place]
        for layer, hearing in zip(self.layers, hearings, strict=True):
            assert isinstance(layer, _Layer)
            others = None if deaf is None else F.pad(deaf, (hearing.others, 0))
            x = layer.extend(x, position, hearing, others)
        return self.norm(x)

    def _decode(self, pixels: Pixels, request: Request) -> tuple[Outputs, list[tuple[Tensor, Tensor]]]:
        """The outputs, and for each layer the keys and values by which the queries heard one another."""
        pattern = PATTERNS[request.pattern]
        x, position, initial = self._queries(request, pattern, pixels.levels[-1])
        deaf = self._self_mask(pattern, request, x)
        silent = 0 if pattern.looks or request.text is None else request.text.tokens.shape[1]
        looking = x.shape[1] - silent
        memory = pixels.levels[-1].memory.index_select(0, request.images)  # once a request, not once a layer
        predictions, heard = [self._predict(x, request, pixels, memory)], []
        for i, layer in enumerate(self.layers):
            level = self._looked_at(pixels, i)
            outside = self._cross_mask(predictions[-1], level, request.images, looking, silent > 0)
            x, keys = layer(x, position, level, request.images, outside, deaf)
            predictions.append(self._predict(x, request, pixels, memory))
            heard.append(keys)
        return Outputs(predictions=tuple(predictions), images=request.images, initial=initial), heard

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
        mode = "bicubic" if self.quirks.bicubic_masks else "bilinear"
        # a resized product is a product with resized features: masks per level cost little; antialiased as
        # X-Decoder has it (Mask2Former and OneFormer have not), so that no thin mask falls between cells
        with torch.no_grad():
            small = F.interpolate(mask_features.float(), size=size, mode=mode, antialias=True)
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
        rows, count = request.images.shape[0], self.latents
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

    def _looked_at(self, pixels: Pixels, layer: int) -> Level:
        """What a layer looks at: the coarsest levels in turn."""
        return pixels.levels[layer % self.levels]

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
        if not self.quirks.padding_counts:
            allowed[:, :, -request.text.padding.shape[1] :] &= ~request.text.padding[:, None]
        allowed |= torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        return ~allowed[:, None]

    @torch.no_grad()
    def _cross_mask(
        self, prediction: Prediction, level: Level, images: Tensor, looking: int, silent: bool = False
    ) -> Tensor:
        """bool[R, 1, looking, hw]: latents look where their mask is, all others at the whole picture; all do
        without masked attention.

        The original clears the wrong row for its image query (off by one); ours looks everywhere, as it was
        meant to, unless `quirks.masked_image_query`. silent: there are queries behind those that look.
        """
        slipped = self.quirks.masked_image_query
        if slipped:
            prediction = prediction.with_image()
        padding = level.padding[images][:, None]
        if not self.masked:
            return padding.expand(-1, looking, -1)[:, None]
        outside = prediction.mask_embed @ level.mask_features[images] < 0  # sigmoid below one half
        outside = outside | padding
        outside &= ~outside.all(-1, keepdim=True)  # a latent that sees nothing sees everything
        if slipped and silent:
            outside[:, 0] = False
        rest = padding.expand(-1, looking - outside.shape[1], -1)
        return torch.cat((outside | padding, rest), 1)[:, None]

    @torch.no_grad()
    def _outside(self, level: Level, images: Tensor, region: Tensor | None) -> Tensor:
        """bool[R, hw], the cells of a level that lie in the padding or, unless none is left, outside a region
        bool[R, H, W]; a cell that touches the region is inside.
        """
        padding = level.padding.index_select(0, images)
        if region is None:
            return padding
        touched = F.adaptive_max_pool2d(region[:, None].float(), level.grid).flatten(1) > 0
        outside = padding | ~touched
        return padding | (outside & ~outside.all(-1, keepdim=True))

    def _predict(self, x: Tensor, request: Request, pixels: Pixels, memory: Tensor) -> Prediction:
        """`memory` float[R, hw, D], the finest level's, a row for each request."""
        z = self.norm(x)
        latents = z[:, : self.latents]
        image = _pool(z[:, self.latents], latents)
        mask_embed, image_mask = self.mask_embed(latents), None
        if self.quirks.masked_image_query or self.quirks.image_query_segments:
            image_mask = self.mask_embed(image)
        named = latents
        if self.pooling is not None:
            named = latents + self.pooling(_shares(mask_embed, pixels.levels[-1], request.images), memory)
        meaning = self.class_embed(torch.cat((named, image[:, None]), 1))
        text = None if request.text is None else z[:, -request.text.tokens.shape[1] :]
        return Prediction(
            semantic=meaning[:, :-1],
            image=meaning[:, -1],
            mask_embed=mask_embed,
            text=text,
            image_mask=image_mask,
        )


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
