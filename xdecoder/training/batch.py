"""Samples to batches: views become tensors, annotations become the targets of the tasks drawn for each image.

Letters: `B` images, `H W` pixels, `R` requests, `M` target masks, `T` tokens, `N` phrases, `A` answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from schemas.masks import Array
from schemas.records import Segment
from schemas.tasks import Task
from xdecoder.prompts import Vocabulary, query_texts, tokenize
from xdecoder.training.augment import View


@dataclass(frozen=True, kw_only=True)
class MaskTargets:
    """Truth of segmentation requests.

    masks          float32[R, M, H, W] of 0 and 1, padded with empty masks; counts[r] are real
    labels         int64[R, M], index into the vocabulary's classes, -1 behind counts[r]
    texts          int64[R * n, T], OneFormer's list of n sentences for each request; empty without task
    tokens
    """

    masks: Tensor
    labels: Tensor
    counts: tuple[int, ...]
    texts: Tensor


@dataclass(frozen=True, kw_only=True)
class PhraseTargets:
    """Truth of referring requests: `texts` int64[N, T], the phrases in order, counts[r] of request r; masks
    as above.
    """

    masks: Tensor
    counts: tuple[int, ...]
    texts: Tensor


@dataclass(frozen=True, kw_only=True)
class CaptionTargets:
    """Truth of retrieval and captioning requests.

    texts      int64[R + N, T], the captions, and behind them what they speak of, counts[r] phrases of request
    r; no counts without the noun loss
    """

    texts: Tensor
    counts: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AnswerTargets:
    """Truth of VQA requests: `texts` int64[R, T], the questions; `answers` float32[R, A], the share that gave
    each.
    """

    texts: Tensor
    answers: Tensor


Targets = MaskTargets | PhraseTargets | CaptionTargets | AnswerTargets


@dataclass(frozen=True, kw_only=True)
class Work:
    """Requests that are decoded and scored together: `images` int64[R] into the batch, a task for each.

    kind       the first task of those that are scored alike; its row of the table says how
    A batch holds a work of every kind that is trained, in the table's order. Where no picture can tell of it,
    R is 0: the losses of several ranks meet, so every rank has to come to each of them.
    """

    kind: Task
    tasks: tuple[Task, ...]
    images: Tensor
    targets: Targets


@dataclass(frozen=True, kw_only=True)
class Batch:
    """float32[B, 3, H, W] in [0, 1], bool[B, H, W] (True is padding), and what is asked of the pictures."""

    images: Tensor
    padding: Tensor
    keys: tuple[str, ...]
    works: tuple[Work, ...]


def collate(views: Sequence[View], works: tuple[Work, ...]) -> Batch:
    """Views of one side -> a batch."""
    # numpy, because torch would start a pool of threads wherever batches are made; with more of them than
    # cores OpenMP puts threads to sleep at every barrier, and a training beside it takes much longer
    pixels = np.stack([view.image for view in views]).astype(np.float32)
    pixels /= 255
    padding = np.ones(pixels.shape[:3], dtype=bool)
    for blank, view in zip(padding, views, strict=True):
        blank[: view.size[0], : view.size[1]] = False
    return Batch(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        padding=torch.from_numpy(padding),
        keys=tuple(view.key for view in views),
        works=works,
    )


def to_device(value: Any, device: torch.device | str) -> Any:
    """The same nest of dataclasses and tuples with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: to_device(getattr(value, f.name), device) for f in fields(value)})
    if isinstance(value, tuple):
        return tuple(to_device(item, device) for item in value)
    return value


def target_masks(
    labels: Array,
    segments: Sequence[Segment],
    classes: Sequence[str],
    *,
    merge_things: bool,
    keep_stuff: bool,
) -> tuple[Array, list[int]]:
    """Masks and classes that a task wants from one panoptic label map (OneFormer, 1.3).

    Crowd segments, segments without a pixel left and classes outside the vocabulary are dropped; stuff of one
    class is one mask; things are one mask each, or one a class where `merge_things`.

    returns    bool[M, H, W] and M class indices, in class order
    """
    index = {name: i for i, name in enumerate(classes)}
    groups: dict[tuple[int, int], list[int]] = {}
    present = set(np.flatnonzero(np.bincount(labels.ravel())).tolist())
    for segment in segments:
        wanted = segment.category in index and not segment.iscrowd and (keep_stuff or segment.isthing)
        if wanted and segment.id in present:
            alone = segment.isthing and not merge_things
            groups.setdefault((index[segment.category], segment.id if alone else 0), []).append(segment.id)
    order = sorted(groups)
    place = np.full(max(present, default=0) + 1, -1)  # of each segment id, its row among the masks
    for row, group in enumerate(order):
        place[groups[group]] = row
    masks = place[labels] == np.arange(len(order)).reshape(-1, *(1,) * labels.ndim)
    return masks, [label for label, _ in order]


def mask_targets(
    found: Sequence[tuple[Array, list[int]]],
    tasks: Sequence[Task],
    vocabulary: Vocabulary,
    texts: int,
    context: int,
) -> MaskTargets:
    """Per-image masks and classes -> padded targets with OneFormer's text list of `texts` sentences each."""
    names = vocabulary.taxonomy.names
    counts = tuple(len(labels) for _, labels in found)
    labels = torch.full((len(found), max(counts, default=0)), -1)
    for row, (_, classes) in enumerate(found):
        labels[row, : len(classes)] = torch.tensor(classes, dtype=torch.int64)
    lists = [query_texts(t, [names[c] for c in cs], texts) for t, (_, cs) in zip(tasks, found, strict=True)]
    ids = tokenize([text for texts_of_one in lists for text in texts_of_one], context)
    return MaskTargets(
        masks=pad_masks([masks for masks, _ in found]),
        labels=labels,
        counts=counts,
        texts=ids,
    )


def pad_masks(masks: Sequence[Array]) -> Tensor:
    """bool[M_r, H, W] of each request -> float32[R, M, H, W]."""
    most = max((len(m) for m in masks), default=0)
    padded = np.zeros((len(masks), most, *(masks[0].shape[1:] if masks else (1, 1))), dtype=np.float32)
    for row, mask in zip(padded, masks, strict=True):
        row[: len(mask)] = mask
    return torch.from_numpy(padded)


def answer_shares(answers: Sequence[str], listed: Sequence[str]) -> Array:
    """The share of people who gave each listed answer, float32[A]; all zero where nobody gave a listed
    one.
    """
    given = [listed.index(answer) for answer in answers if answer in listed]
    shares = np.bincount(given, minlength=len(listed)).astype(np.float32)
    return shares / max(1, len(given))
