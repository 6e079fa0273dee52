"""THE TABLE: what each of the seven tasks draws from a sample, learns, answers and is scored by.

Adding a task is adding a row. Nothing else in the project asks which task it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from schemas.jobs import ModelConfig, TrainConfig
from schemas.records import Sample
from schemas.tasks import Stream, Task
from xdecoder.inference import exams, gallery
from xdecoder.inference.exams import Exam, Sitting, Subject
from xdecoder.inference.metrics import MaskAP, MeanIoU, Metric, PanopticQuality, ReferringIoU
from xdecoder.inference.text_metrics import CaptionScores, RetrievalRecall, VqaAccuracy
from xdecoder.model.text import TextFeatures
from xdecoder.prompts import Vocabulary, nouns, tokenize
from xdecoder.training import losses
from xdecoder.training.augment import View, jittered, resized
from xdecoder.training.batch import (
    AnswerTargets,
    Batch,
    CaptionTargets,
    MaskTargets,
    PhraseTargets,
    Targets,
    Work,
    answer_shares,
    collate,
    mask_targets,
    pad_masks,
    target_masks,
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What drawing a truth needs to know beside the sample."""

    model: ModelConfig
    train: TrainConfig
    vocabulary: Vocabulary


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One task.

    stream     which batch of a step it is trained from
    truth      what one view says of it, or None where the view says nothing
    targets    the truths of several views -> tensors; tasks with the same function share one decoder pass
    loss       the named terms of such a pass, given the targets' texts, encoded
    exam       how held-out samples are read and scored
    metric     an empty metric of the exam's kind, to load stored rows into
    picture    one prediction beside its truth
    """

    stream: Stream
    truth: Callable[[View, Setting, np.random.Generator], Any | None]
    targets: Callable[[Sequence[Any], Sequence[Task], Setting], Targets]
    loss: Callable[[losses.Scene, Work, TextFeatures], losses.Terms]
    exam: Callable[[Sitting, Sequence[Sample]], Exam]
    metric: Callable[[Subject], Metric]
    picture: Callable[[Sitting, Sample], Image.Image]


# ------------------------------------------------------------------------------------------------ what a view
# says


def _segments(
    view: View, setting: Setting, rng: np.random.Generator, *, merge_things: bool, keep_stuff: bool
) -> Any:
    if view.labels is None:
        return None
    names = setting.vocabulary.taxonomy.names
    return target_masks(view.labels, view.segments, names, merge_things=merge_things, keep_stuff=keep_stuff)


def _phrases(view: View, setting: Setting, rng: np.random.Generator) -> Any:
    """A random number of the regions that are still in view, at most max_phrases, one sentence each."""
    count = rng.integers(1, setting.train.max_phrases + 1)
    visible = rng.permutation(np.flatnonzero(view.masks.any((1, 2))))[:count]
    if not len(visible):
        return None
    return view.masks[visible], [str(rng.choice(view.sentences[i])) for i in visible]


def _caption(view: View, setting: Setting, rng: np.random.Generator) -> Any:
    return str(rng.choice(view.captions)) if view.captions else None


def _question(view: View, setting: Setting, rng: np.random.Generator) -> Any:
    """One question that has an answer in the list, and the shares of its answers."""
    listed = setting.vocabulary.answers
    usable = [q for q in view.questions if set(q.answers) & set(listed)]
    if not usable:
        return None
    question = usable[rng.integers(len(usable))]
    return question.question, answer_shares(question.answers, listed)


# ------------------------------------------------------------------------------------------------ truths to
# tensors


def _mask_targets(truths: Sequence[Any], tasks: Sequence[Task], setting: Setting) -> MaskTargets:
    texts = setting.model.latents + 1 - setting.model.text_contexts if setting.model.task_tokens else 0
    return mask_targets(truths, tasks, setting.vocabulary, texts, setting.model.context)


def _phrase_targets(truths: Sequence[Any], tasks: Sequence[Task], setting: Setting) -> PhraseTargets:
    masks, phrases = [m for m, _ in truths], [p for _, p in truths]
    return PhraseTargets(
        masks=pad_masks(masks),
        counts=tuple(len(m) for m in masks),
        texts=tokenize([p for several in phrases for p in several], setting.model.context),
    )


def _caption_targets(truths: Sequence[Any], tasks: Sequence[Task], setting: Setting) -> CaptionTargets:
    return CaptionTargets(texts=tokenize(truths, setting.model.context))


def _retrieval_targets(truths: Sequence[Any], tasks: Sequence[Task], setting: Setting) -> CaptionTargets:
    """The captions, and what each speaks of where that is taught."""
    if not setting.train.loss.nouns:
        return _caption_targets(truths, tasks, setting)
    found = [nouns(caption)[: setting.model.latents] for caption in truths]
    texts = [*truths, *(noun for several in found for noun in several)]
    return CaptionTargets(
        texts=tokenize(texts, setting.model.context), counts=tuple(len(several) for several in found)
    )


def _answer_targets(truths: Sequence[Any], tasks: Sequence[Task], setting: Setting) -> AnswerTargets:
    shares = np.array([s for _, s in truths], dtype=np.float32)
    return AnswerTargets(
        texts=tokenize([q for q, _ in truths], setting.model.context),
        answers=torch.from_numpy(shares.reshape(len(truths), len(setting.vocabulary.answers))),
    )


# ------------------------------------------------------------------------------------------------ the table

_masked = partial(TaskRow, stream="segmentation", targets=_mask_targets, loss=losses.segmentation)

TABLE: Mapping[Task, TaskRow] = {
    "semantic": _masked(
        truth=partial(_segments, merge_things=True, keep_stuff=True),
        exam=exams.semantic,
        metric=lambda subject: MeanIoU(subject.taxonomy.seen()),
        picture=gallery.semantic,
    ),
    "instance": _masked(
        truth=partial(_segments, merge_things=False, keep_stuff=False),
        exam=exams.instance,
        metric=lambda subject: MaskAP(subject.taxonomy.seen()),
        picture=gallery.instance,
    ),
    "panoptic": _masked(
        truth=partial(_segments, merge_things=False, keep_stuff=True),
        exam=exams.panoptic,
        metric=lambda subject: PanopticQuality(subject.taxonomy.seen()),
        picture=gallery.panoptic,
    ),
    "referring": TaskRow(
        stream="segmentation",
        truth=_phrases,
        targets=_phrase_targets,
        loss=losses.referring,
        exam=exams.referring,
        metric=lambda subject: ReferringIoU(),
        picture=gallery.referring,
    ),
    "retrieval": TaskRow(
        stream="image_text",
        truth=_caption,
        targets=_retrieval_targets,
        loss=losses.retrieval,
        exam=exams.retrieval,
        metric=lambda subject: RetrievalRecall(),
        picture=gallery.retrieval,
    ),
    "captioning": TaskRow(
        stream="image_text",
        truth=_caption,
        targets=_caption_targets,
        loss=losses.captioning,
        exam=exams.captioning,
        metric=lambda subject: CaptionScores(sorted(subject.taxonomy.things)),
        picture=gallery.captioning,
    ),
    "vqa": TaskRow(
        stream="image_text",
        truth=_question,
        targets=_answer_targets,
        loss=losses.vqa,
        exam=exams.vqa,
        metric=lambda subject: VqaAccuracy(subject.kinds),
        picture=gallery.vqa,
    ),
}

# One of these is drawn for each image and load; the others are trained wherever an image can tell of them.
ALTERNATIVES: tuple[Task, ...] = ("semantic", "instance", "panoptic")


@dataclass(frozen=True, kw_only=True)
class BatchMaker:
    """Samples of a stream and a seed for each -> a batch with its works. Picklable: loader processes hold
    one.
    """

    stream: Stream
    setting: Setting

    def __call__(self, samples: Sequence[Sample], seeds: Sequence[int]) -> Batch:
        draws = [np.random.default_rng(seed) for seed in seeds]
        make = jittered if self.stream == "segmentation" else resized
        views = [make(s, self.setting.train.augment, rng) for s, rng in zip(samples, draws, strict=True)]
        kinds = self._kinds()
        found: dict[Task, list[tuple[int, Task, Any]]] = {kind: [] for kind in kinds.values()}
        for i, (view, rng) in enumerate(zip(views, draws, strict=True)):
            for task in self._tasks(rng):
                truth = TABLE[task].truth(view, self.setting, rng)
                if truth is not None:
                    found[kinds[task]].append((i, task, truth))
        return collate(views, tuple(self._work(kind, rows) for kind, rows in found.items()))

    @property
    def _wanted(self) -> list[Task]:
        return [t for t in TABLE if t in self.setting.train.tasks and TABLE[t].stream == self.stream]

    def _kinds(self) -> dict[Task, Task]:
        """For each task of the stream, the first of those whose requests are decoded and scored alike."""
        first: dict[Any, Task] = {}
        return {t: first.setdefault((TABLE[t].targets, TABLE[t].loss), t) for t in self._wanted}

    def _tasks(self, rng: np.random.Generator) -> list[Task]:
        """The tasks to try on one image, in the table's order."""
        wanted = self._wanted
        chances = dict(zip(ALTERNATIVES, self.setting.train.task_sampling, strict=True))
        options = [t for t in wanted if chances.get(t, 0) > 0]
        drawn: Task | None = None
        if options:
            weights = np.array([chances[t] for t in options])
            drawn = options[rng.choice(len(options), p=weights / weights.sum())]
        shares = self.setting.train.shares
        return [
            t for t in wanted if t == drawn or (t not in ALTERNATIVES and rng.random() < shares.get(t, 1))
        ]

    def _work(self, kind: Task, rows: list[tuple[int, Task, Any]]) -> Work:
        tasks = tuple(task for _, task, _ in rows)
        targets = TABLE[kind].targets([truth for _, _, truth in rows], tasks, self.setting)
        images = torch.tensor([i for i, _, _ in rows], dtype=torch.int64)
        return Work(kind=kind, tasks=tasks, images=images, targets=targets)
