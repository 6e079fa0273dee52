"""The one text encoder: class names, phrases, captions, questions, answers and task sentences all pass
through it.

CLIP's causal transformer. Letters: `N` texts, `T` tokens, `D` width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.jobs import TextConfig
from xdecoder.model.layers import Attention, Kept, matrix
from xdecoder.prompts import END, PAD, VOCABULARY_SIZE


@dataclass(frozen=True, kw_only=True)
class TextFeatures:
    """What the encoder says of N texts, projected to the joint space and not normalised.

    ids         int64[N, T]
    tokens      float[N, T, D], one for each token; what stands at padding means nothing
    sentence    float[N, D], the token at the first end mark
    padding     bool[N, T], True behind the end mark
    """

    ids: Tensor
    tokens: Tensor
    sentence: Tensor
    padding: Tensor

    def rows(self, chosen: slice) -> "TextFeatures":
        """Of some of the texts."""
        return replace(self, **{f.name: getattr(self, f.name)[chosen] for f in fields(self)})


class _Block(nn.Module):
    """Pre-norm residual block with QuickGELU, x sigmoid(1.702 x).

    Initialised by width and depth, as CLIP is (OneFormer reference, 1.5).
    """

    def __init__(self, width: int, heads: int, layers: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads)
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for linear in (self.attention.query, self.attention.key, self.attention.value):
            nn.init.normal_(linear.weight, std=width**-0.5)
        for linear in (self.attention.out, self.proj):
            nn.init.normal_(linear.weight, std=width**-0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.fc.weight, std=(2 * width) ** -0.5)

    def forward(self, x: Tensor, blocked: Tensor | None, before: Kept | None = None) -> Tensor:
        """`before` holds the tokens in front of x, and keeps those of x."""
        h = self.norm1(x)
        keys, values = self.attention.project(h, h)
        if before is not None:
            keys, values = before.add(keys, values)
        x = x + self.attention(h, keys, values, blocked)
        h = self.fc(self.norm2(x))
        return x + self.proj(h * torch.sigmoid(1.702 * h))


# Chosen by us, for steps in which class names of a few tokens stand beside captions of thrice their length.
_LENGTH_GROUPS = 3


class TextEncoder(nn.Module):
    """int64[N, T] token ids -> `TextFeatures`. Equal texts are encoded once, and short ones apart from long
    ones.

    padding_counts    what stands at padding is wanted, too (`QuirksConfig`): all are encoded at full length
    """

    def __init__(self, width: int, config: TextConfig, *, padding_counts: bool = False) -> None:
        super().__init__()
        self.context, self.padding_counts = config.context, padding_counts
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, width)
        self.positions = nn.Parameter(torch.empty(config.context, width))
        self.blocks = nn.ModuleList(
            _Block(width, config.heads, config.layers, config.norm_eps) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.project = matrix(width, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.project.weight, std=width**-0.5)

    def forward(self, ids: Tensor) -> TextFeatures:
        if ids.shape[1] > self.context:
            raise ValueError(f"a text has {ids.shape[1]} tokens, the text encoder reads {self.context}")
        distinct, where = torch.unique(ids, dim=0, return_inverse=True)
        tokens = self._by_length(distinct).index_select(0, where)
        end = (ids == END).int().argmax(1)  # argmax takes the first
        later = torch.arange(ids.shape[1], device=ids.device) > end[:, None]
        sentence = tokens[torch.arange(len(ids), device=ids.device), end]
        return TextFeatures(ids=ids, tokens=tokens, sentence=sentence, padding=later)

    def several(self, groups: Sequence[Tensor]) -> list[TextFeatures]:
        """Groups of texts int64[N_i, T_i] in one pass; a text that stands in many groups is still encoded
        once.
        """
        longest = max(ids.shape[1] for ids in groups)
        joined = self(torch.cat([F.pad(ids, (0, longest - ids.shape[1]), value=PAD) for ids in groups]))
        parts, start = [], 0
        for ids in groups:
            rows, width = slice(start, start + len(ids)), ids.shape[1]
            parts.append(
                TextFeatures(
                    ids=ids,
                    tokens=joined.tokens[rows, :width],
                    sentence=joined.sentence[rows],
                    padding=joined.padding[rows, :width],
                )
            )
            start += len(ids)
        return parts

    def _by_length(self, ids: Tensor) -> Tensor:
        """float[N, T, D]; behind the bound of a text's group stand zeros."""
        embedded, size = self.token_embedding(ids), ids.shape[1]  # one look-up: its gradient is a whole table
        if self.padding_counts or not len(ids):
            return self._encode(embedded)
        ends = ids == END
        length = torch.where(ends.any(1), ends.int().argmax(1) + 1, size)
        longest = int(length.max())
        bounds = [-(-longest * (i + 1) // _LENGTH_GROUPS) for i in range(_LENGTH_GROUPS)]
        group = torch.bucketize(length, torch.tensor(bounds, device=ids.device))
        rows = [(group == i).nonzero()[:, 0] for i in range(_LENGTH_GROUPS)]
        parts = [
            F.pad(self._encode(embedded[row, :bound]), (0, 0, 0, size - bound))
            for row, bound in zip(rows, bounds, strict=True)
            if len(row)
        ]
        return torch.cat(parts).index_select(0, torch.cat(rows).argsort())

    def _encode(self, embedded: Tensor) -> Tensor:
        """Embedded tokens float[N, T, D] -> what the encoder says of each."""
        length = embedded.shape[1]
        x = embedded + self.positions[:length]
        blocked = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, blocked)
        return self.project(self.norm(x))

    def begin(self, texts: int, room: int) -> tuple[Kept, ...]:
        """What `extend` keeps of `texts` growing texts, each with room for so many tokens; one a block."""
        nothing = self.positions.new_empty(texts, 0, self.positions.shape[1])
        return tuple(Kept(nothing, nothing, room) for _ in self.blocks)

    def extend(self, ids: Tensor, place: int, before: Sequence[Kept], blocked: Tensor | None) -> Tensor:
        """Tokens at `place` of growing texts: int64[N, n] -> float[N, n, D], as `forward` would give them.

        before     from `begin`; holds the tokens of earlier calls, and keeps these
        blocked    bool[N, 1, n, M], which of all M tokens given so far do not stand in front of which; None
                   where all do
        """
        x = self.token_embedding(ids) + self.positions[place]
        for block, kept in zip(self.blocks, before, strict=True):
            x = block(x, blocked, kept)
        return self.project(self.norm(x))

    def token_logits(self, slots: Tensor, tokens: Tensor | None = None) -> Tensor:
        """float[..., D] -> float[..., C] for the tokens int64[C], by default the whole vocabulary.

        The output matrix is the input's token table (X-Decoder, 1.5).
        """
        table = self.token_embedding.weight if tokens is None else self.token_embedding(tokens)
        return F.linear(slots, table)


class Wordless(nn.Module):
    """Stands in a model that knows no words: the meaning of a text has width 0, so nothing can come of it."""

    def forward(self, ids: Tensor) -> TextFeatures:
        nothing = torch.zeros(*ids.shape, 0, device=ids.device)
        later = torch.zeros_like(ids, dtype=torch.bool)
        return TextFeatures(ids=ids, tokens=nothing, sentence=nothing[:, 0], padding=later)

    def several(self, groups: Sequence[Tensor]) -> list[TextFeatures]:
        return [self(ids) for ids in groups]

    def token_logits(self, slots: Tensor, tokens: Tensor | None = None) -> Tensor:
        raise ValueError("this model knows no words: model.text is null")
