"""From mask classification to answers for one image: class map, segments, instances, masks of phrases.

Everything here is decision rules on (class, mask) pairs; the pairs come from the model and are scored
elsewhere. The order is Mask2Former's: resize the logits to the padded input, crop the padding, resize to the
picture as it came, then decide. Full-size masks are made for the chosen queries only, a few at a time, so
memory does not grow with Q.

Letters: Q queries, K classes, P phrases, h w mask grid of the model, H W pixels of the original picture.
Tensors come in on any device; what goes out is numpy in host memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from schemas.masks import Array

# Elements of one full-size working tensor (256 MiB in float32); gives the chunks of queries and classes.
CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Frame:
    """Where a picture lies in what the model saw, each (height, width) in pixels.

    padded     the tensor given to the model; the mask grid h, w spans all of it
    valid      its upper left part that is picture, not padding
    original   the picture as it came, and the size of all answers
    bicubic    how mask logits get there: bicubic and antialiased (X-Decoder, 5.1), else bilinear
    """

    padded: tuple[int, int]
    valid: tuple[int, int]
    original: tuple[int, int]
    bicubic: bool = False


@dataclass(frozen=True, kw_only=True)
class PredictedSegment:
    """One segment of a `PanopticMap`: its pixel value, class index, score in [0, 1] and kind."""

    id: int
    label: int
    score: float
    isthing: bool


@dataclass(frozen=True, kw_only=True)
class PanopticMap:
    """labels int32[H, W]: the id of the segment at each pixel, 0 for none; `segments` lists every id once."""

    labels: Array
    segments: tuple[PredictedSegment, ...]


@dataclass(frozen=True, kw_only=True)
class Instances:
    """Things, possibly overlapping, best first: labels int64[n], scores float32[n], masks bool[n, H, W]."""

    labels: Array
    scores: Array
    masks: Array


@torch.no_grad()
def semantic(class_probs: Tensor, mask_logits: Tensor, frame: Frame, handicap: Tensor | None = None) -> Array:
    """The class of each pixel: argmax over c of sum_q p_q(c) sigmoid(m_q), no-object left out (MaskFormer,
    3.4).

    class_probs float32[Q, K+1] (softmax, no object last), mask_logits float32[Q, h, w] -> int64[H, W].
    handicap float32[K] in [0, 1] is taken from the sums (ZegFormer's calibration).
    """
    votes = class_probs[:, :-1].float()
    best = torch.full(frame.original, -torch.inf, device=votes.device)
    label = torch.zeros(frame.original, dtype=torch.int64, device=votes.device)
    step = _chunk(frame)
    for first in range(0, votes.shape[1], step):
        some = votes[:, first : first + step]
        scores = torch.zeros(some.shape[1], *frame.original, device=votes.device)
        for rows, probs in _full_size_probs(mask_logits, frame):
            scores += torch.einsum("qc,qhw->chw", some[rows], probs)
        if handicap is not None:
            scores -= handicap[first : first + step, None, None]
        top, index = scores.max(0)
        label = torch.where(top > best, index + first, label)
        best = torch.maximum(top, best)
    return label.cpu().numpy()


@torch.no_grad()
def panoptic(
    class_probs: Tensor,
    mask_logits: Tensor,
    frame: Frame,
    *,
    things: Tensor,
    object_threshold: float,
    overlap_threshold: float,
) -> PanopticMap:
    """Non-overlapping segments by Mask2Former's rules, which, unlike MaskFormer's, cut to sigmoid >= 0.5.

    A query is a candidate where its best class is not no-object and scores above `object_threshold`. It owns
    the pixels where score x sigmoid is largest, and gets those of them that it covers (sigmoid >= 0.5). It is
    dropped where it owns less than `overlap_threshold` of what it covers. Stuff of one class is one segment,
    with the best score of its parts.

    class_probs float32[Q, K+1] (softmax, no object last), mask_logits float32[Q, h, w], things bool[K].
    """
    scores, classes = class_probs.float().max(-1)
    kept = (classes < class_probs.shape[1] - 1) & (scores > object_threshold)
    scores, classes = scores[kept], classes[kept]
    owner, covers, covered = _owners(scores, mask_logits[kept], frame)
    region = torch.where(covers, owner, len(scores))
    owned, visible = _areas(owner, len(scores)), _areas(region, len(scores))
    stands = (visible > 0) & (owned / covered.double() >= overlap_threshold)
    ids, segments = _segments(scores[stands].tolist(), classes[stands].tolist(), things)
    id_of = torch.zeros(len(scores) + 1, dtype=torch.int32)  # the last candidate is nobody
    id_of[:-1][stands.cpu()] = torch.tensor(ids, dtype=torch.int32)
    return PanopticMap(labels=id_of[region.cpu()].numpy(), segments=segments)


@torch.no_grad()
def instances(
    class_probs: Tensor, mask_logits: Tensor, frame: Frame, *, things: Tensor, top_k: int
) -> Instances:
    """The `top_k` best (query, class) pairs of all Q x K, of which the things (Mask2Former).

    The score is the class's times the mean mask probability inside the mask (logit > 0); pairs with an empty
    mask are dropped, so fewer than `top_k` may come back.

    class_probs float32[Q, K+1] (softmax, no object last), mask_logits float32[Q, h, w], things bool[K].
    """
    flat = class_probs[:, :-1].float().flatten()
    scores, order = flat.topk(min(top_k, flat.numel()))
    queries, labels = order // (class_probs.shape[1] - 1), order % (class_probs.shape[1] - 1)
    wanted = things.to(labels.device)[labels]
    scores, queries, labels = scores[wanted], queries[wanted], labels[wanted]
    used, index = queries.unique(return_inverse=True)
    quality = torch.zeros(len(used), device=flat.device)
    masks = np.zeros((len(used), *frame.original), dtype=bool)
    for rows, probs in _full_size_probs(mask_logits[used], frame):
        inside = probs > 0.5
        quality[rows] = (probs * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        masks[rows] = inside.cpu().numpy()
    scores = scores * quality[index]
    best = scores.argsort(descending=True, stable=True)
    best = best[scores[best] > 0]
    return Instances(
        labels=labels[best].cpu().numpy(),
        scores=scores[best].cpu().numpy(),
        masks=masks[index[best].cpu().numpy()],
    )


@torch.no_grad()
def referring(similarity: Tensor, mask_logits: Tensor, frame: Frame) -> Array:
    """The mask (sigmoid > 0.5) of the query nearest to each phrase.

    similarity float32[Q, P], mask_logits float32[Q, h, w] -> bool[P, H, W].
    """
    return masks(mask_logits[similarity.argmax(0)], frame)


@torch.no_grad()
def masks(mask_logits: Tensor, frame: Frame) -> Array:
    """Each mask on its own, sigmoid > 0.5: float32[P, h, w] -> bool[P, H, W]."""
    inside = np.zeros((len(mask_logits), *frame.original), dtype=bool)
    for rows, probs in _full_size_probs(mask_logits, frame):
        inside[rows] = (probs > 0.5).cpu().numpy()
    return inside


def _chunk(frame: Frame) -> int:
    return max(
        1, CHUNK_ELEMENTS // max(frame.padded[0] * frame.padded[1], frame.original[0] * frame.original[1])
    )


def _full_size_probs(mask_logits: Tensor, frame: Frame) -> Iterator[tuple[slice, Tensor]]:
    """sigmoid of the resized logits, a few queries at a time: (which rows, float32[rows, H, W])."""
    step = _chunk(frame)
    mode = "bicubic" if frame.bicubic else "bilinear"
    resize = partial(F.interpolate, mode=mode, antialias=frame.bicubic, align_corners=False)
    for first in range(0, len(mask_logits), step):
        part = mask_logits[None, first : first + step].float()
        part = resize(part, size=frame.padded)[..., : frame.valid[0], : frame.valid[1]]
        if frame.valid != frame.original:
            part = resize(part, size=frame.original)
        yield slice(first, first + step), part[0].sigmoid()


def _owners(scores: Tensor, mask_logits: Tensor, frame: Frame) -> tuple[Tensor, Tensor, Tensor]:
    """Who owns each pixel (int64[H, W], n for nobody), whether the owner covers it (bool[H, W]), and how many
    pixels each of the n candidates covers (int64[n]). The first of equals owns, as with argmax over all.
    """
    device, n = mask_logits.device, len(scores)
    owner = torch.full(frame.original, n, dtype=torch.int64, device=device)
    best = torch.full(frame.original, -1.0, device=device)
    covers = torch.zeros(frame.original, dtype=torch.bool, device=device)
    covered = torch.zeros(n, dtype=torch.int64, device=device)
    for rows, probs in _full_size_probs(mask_logits, frame):
        top, index = (scores[rows, None, None] * probs).max(0)
        solid = probs >= 0.5
        covered[rows] = solid.sum((1, 2))
        wins = top > best
        owner = torch.where(wins, index + rows.start, owner)
        covers = torch.where(wins, solid.gather(0, index[None])[0], covers)
        best = torch.maximum(top, best)
    return owner, covers, covered


def _areas(owner: Tensor, num_candidates: int) -> Tensor:
    return torch.bincount(owner.flatten(), minlength=num_candidates + 1)[:-1]


def _segments(
    scores: list[float], labels: list[int], things: Tensor
) -> tuple[list[int], tuple[PredictedSegment, ...]]:
    """The segment id of each candidate, and the segments: one a thing, one for all stuff of a class."""
    keys = [(label, query if things[label] else -1) for query, label in enumerate(labels)]
    id_of = {key: i for i, key in enumerate(dict.fromkeys(keys), start=1)}
    best: dict[tuple[int, int], float] = {}
    for key, score in zip(keys, scores, strict=True):
        best[key] = max(score, best.get(key, 0.0))
    segments = (
        PredictedSegment(id=i, label=key[0], score=best[key], isthing=key[1] >= 0) for key, i in id_of.items()
    )
    return [id_of[key] for key in keys], tuple(segments)
