"""Laws of the targets: what each task wants from one annotation (OneFormer, 1.3), and its tensors."""

import numpy as np
import pytest
import torch
from tiny import MODEL, TAXONOMY, VOCABULARY, bare, samples, train_config

from schemas.jobs import AugmentConfig, LossConfig
from schemas.records import Question, Sample, Segment
from schemas.tasks import TASKS, Task
from xdecoder.prompts import detokenize, nouns
from xdecoder.tasks import ALTERNATIVES, TABLE, BatchMaker, Setting
from xdecoder.training.augment import View, jittered
from xdecoder.training.batch import (
    AnswerTargets,
    Batch,
    CaptionTargets,
    MaskTargets,
    PhraseTargets,
    answer_shares,
    mask_targets,
    target_masks,
)

# 1 and 2 are dogs, 3 a crowd of dogs, 4 and 5 two pieces of grass, 6 sky, 7 a cat with no pixel, 8 unknown
LABELS = np.array([[1, 1, 2, 0, 3], [4, 4, 5, 5, 3], [6, 6, 6, 8, 0]], dtype=np.uint16)
CLASSES = ("cat", "dog", "grass", "sky")
KINDS = ["dog", "dog", "dog", "grass", "grass", "sky", "cat", "elephant"]
SEGMENTS = [
    Segment(
        id=i,
        category=kind,
        isthing=kind in ("dog", "cat", "elephant"),
        iscrowd=i == 3,
        area=1,
        bbox=(0, 0, 1, 1),
    )
    for i, kind in enumerate(KINDS, 1)
]
# the ids under each mask
WANTED = {
    "semantic": [("dog", {1, 2}), ("grass", {4, 5}), ("sky", {6})],
    "instance": [("dog", {1}), ("dog", {2})],
    "panoptic": [("dog", {1}), ("dog", {2}), ("grass", {4, 5}), ("sky", {6})],
}


def maker(*tasks: Task, **changes: object) -> BatchMaker:
    train = train_config(tasks=tasks, **changes)
    return BatchMaker(
        stream=TABLE[tasks[0]].stream, setting=Setting(model=MODEL, train=train, vocabulary=VOCABULARY)
    )


def only(batch: Batch) -> object:
    (work,) = batch.works
    return work.targets


def still(sample: Sample) -> View:
    """The whole picture, nothing random."""
    return jittered(sample, AugmentConfig(image_size=32, scale=(1, 1), flip=0), np.random.default_rng(0))


@pytest.mark.parametrize("task", ALTERNATIVES)
def test_each_task_wants_what_oneformer_says(task: str) -> None:
    masks, labels = target_masks(
        LABELS, SEGMENTS, CLASSES, merge_things=task == "semantic", keep_stuff=task != "instance"
    )
    assert masks.dtype == bool and masks.shape == (len(WANTED[task]), 3, 5)
    found = [
        (CLASSES[label], set(np.unique(LABELS[mask]).tolist()))
        for mask, label in zip(masks, labels, strict=True)
    ]
    assert found == WANTED[task]
    for mask, (_, ids) in zip(masks, WANTED[task], strict=True):
        np.testing.assert_array_equal(mask, np.isin(LABELS, list(ids)))


def test_void_crowds_and_unknown_classes_are_in_no_mask() -> None:
    masks, _ = target_masks(LABELS, SEGMENTS, CLASSES, merge_things=False, keep_stuff=True)
    assert masks.sum(0).max() == 1
    np.testing.assert_array_equal(~masks.any(0), np.isin(LABELS, [0, 3, 8]))


def test_a_picture_without_segments_has_no_targets() -> None:
    masks, labels = target_masks(LABELS * 0, SEGMENTS, CLASSES, merge_things=False, keep_stuff=True)
    assert masks.shape == (0, 3, 5) and labels == []


def test_mask_targets_are_padded_and_counted() -> None:
    found = [
        target_masks(LABELS, SEGMENTS, TAXONOMY.names, merge_things=False, keep_stuff=True),
        (np.ones((2, 3, 5), dtype=bool), [1, 3]),
    ]
    targets = mask_targets(found, ("panoptic", "instance"), VOCABULARY, 4, 20)
    assert targets.counts == (2, 2)  # of the tiny classes there are grass and sky
    assert targets.labels.tolist() == [[0, 1], [1, 3]]
    assert targets.masks.shape == (2, 2, 3, 5)
    texts = [detokenize(row) for row in targets.texts.tolist()]
    assert texts[:4] == ["a photo with a sky", "a photo with a grass", *["a panoptic photo"] * 2]
    assert texts[4:] == ["a photo with a grass", "a photo with a blue square", *["an instance photo"] * 2]


@pytest.mark.parametrize("task", ALTERNATIVES)
def test_the_table_builds_the_targets_of_its_task(task: Task) -> None:
    batch = maker(task)(samples(3), [0, 1, 2])
    targets = only(batch)
    assert isinstance(targets, MaskTargets)
    assert targets.counts == (2 if task == "instance" else 4,) * 3
    assert len(targets.texts) == 3 * (MODEL.latents + 1 - MODEL.text_contexts)
    for row, sample in enumerate(samples(3)):
        assert sample.labels is not None and sample.meta.segments is not None
        by_name = {s.category: sample.labels == s.id for s in sample.meta.segments}
        for label, mask in zip(targets.labels[row].tolist(), targets.masks[row].numpy(), strict=True):
            np.testing.assert_array_equal(mask, by_name[TAXONOMY.names[label]])


def test_phrases_come_with_their_regions() -> None:
    targets = only(maker("referring")(samples(8), list(range(8))))
    assert isinstance(targets, PhraseTargets) and set(targets.counts) == {1, 2}
    texts = iter(detokenize(row) for row in targets.texts.tolist())
    for row, sample in enumerate(samples(8)):
        for slot in range(targets.counts[row]):
            text = next(texts)
            (region,) = [i for i, r in enumerate(sample.meta.referring) if text in r.sentences]
            np.testing.assert_array_equal(targets.masks[row, slot].numpy(), sample.labels == 3 + region)
        assert not targets.masks[row, targets.counts[row] :].any()
    assert next(texts, None) is None


def test_phrases_are_bounded_and_those_out_of_view_are_left_out() -> None:
    targets = only(maker("referring", max_phrases=1)(samples(2), [0, 1]))
    assert isinstance(targets, PhraseTargets) and targets.counts == (1, 1)
    sample = samples(1)[0]
    view = still(sample)
    view.masks[0] = False  # as a crop may do
    setting = maker("referring").setting
    _, phrases = TABLE["referring"].truth(view, setting, np.random.default_rng(0))  # type: ignore[misc]
    assert phrases == ["blue square"]
    view.masks[1] = False
    assert TABLE["referring"].truth(view, setting, np.random.default_rng(0)) is None


def test_captions_and_questions_become_texts() -> None:
    captions = only(maker("captioning")(samples(2), [0, 1]))
    assert isinstance(captions, CaptionTargets)
    assert [detokenize(row) for row in captions.texts.tolist()] == [s.meta.captions[0] for s in samples(2)]
    answers = only(maker("vqa")(samples(2), [0, 1]))
    assert isinstance(answers, AnswerTargets) and answers.answers.shape == (2, 4)
    for row, sample in zip(range(2), samples(2), strict=True):
        asked = detokenize(answers.texts[row].tolist()).replace(" ", "")
        (question,) = [q for q in sample.meta.questions if q.question.replace(" ", "") == asked]
        expected = [float(answer == question.answers[0]) for answer in VOCABULARY.answers]
        assert answers.answers[row].tolist() == expected


def test_what_captions_speak_of_stands_behind_them() -> None:
    targets = only(maker("retrieval")(samples(2), [0, 1]))
    assert isinstance(targets, CaptionTargets)
    captions = [s.meta.captions[0] for s in samples(2)]
    spoken = [nouns(caption) for caption in captions]
    assert targets.counts == tuple(map(len, spoken)) and min(targets.counts) > 1
    found = [detokenize(row) for row in targets.texts.tolist()]
    assert found == [*captions, *(phrase for phrases in spoken for phrase in phrases)]


def test_without_a_noun_loss_captions_stand_alone() -> None:
    loss = LossConfig(points=64, region_ce=1)
    targets = only(maker("retrieval", loss=loss)(samples(2), [0, 1]))
    assert isinstance(targets, CaptionTargets) and targets.counts == () and len(targets.texts) == 2


def test_answers_are_shares_of_those_that_are_listed() -> None:
    listed = ("yes", "no", "two")
    assert answer_shares(["yes"] * 3 + ["no"] + ["maybe"] * 6, listed).tolist() == [0.75, 0.25, 0]
    assert answer_shares(["maybe"], listed).tolist() == [0, 0, 0]


def test_a_question_without_a_listed_answer_is_not_asked() -> None:
    sample = samples(1)[0]
    odd = Question(question="why?", answers=("because",), kind="why")
    meta = sample.meta.model_copy(update={"questions": (odd,)})
    view = still(type(sample)(meta=meta, image=sample.image, labels=sample.labels))
    assert TABLE["vqa"].truth(view, maker("vqa").setting, np.random.default_rng(0)) is None


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_without_the_annotation_says_nothing(task: Task) -> None:
    make = maker(task)
    mute = bare(samples(1)[0])
    batch = make([mute, samples(1)[0], mute], [0, 1, 2])
    (work,) = batch.works
    assert work.images.tolist() == [1] and work.tasks == (task,) and len(batch.images) == 3


@pytest.mark.parametrize("task", TASKS)
def test_a_work_stands_also_where_nothing_can_be_asked(task: Task) -> None:
    """All ranks have the same works in the same order, whatever their pictures hold."""
    mute, told = [bare(s) for s in samples(2)], samples(2)
    make = maker(*(t for t in TASKS if TABLE[t].stream == TABLE[task].stream))
    empty, full = make(mute, [0, 1]), make(told, [0, 1])
    assert [work.kind for work in empty.works] == [work.kind for work in full.works]
    assert all(len(work.images) == 0 for work in empty.works)


def test_one_of_the_three_mask_tasks_is_drawn_for_each_picture() -> None:
    make = maker(*ALTERNATIVES, task_sampling=(0.2, 0.3, 0.5))
    drawn = [task for work in make(samples(1) * 300, list(range(300))).works for task in work.tasks]
    assert len(drawn) == 300
    for task, share in zip(ALTERNATIVES, (0.2, 0.3, 0.5), strict=True):
        assert drawn.count(task) / 300 == pytest.approx(share, abs=0.09)


def test_a_task_that_is_not_trained_is_never_drawn() -> None:
    (work,) = maker("instance", task_sampling=(0.5, 0.1, 0.4))(samples(4), [0, 1, 2, 3]).works
    assert work.tasks == ("instance",) * 4


def test_shares_thin_out_a_task() -> None:
    (work,) = maker("referring", shares={"referring": 0.25})(samples(1) * 200, list(range(200))).works
    assert 20 < len(work.images) < 80


def test_the_same_seeds_give_the_same_batch() -> None:
    make = maker("panoptic", "semantic", "referring")
    one, two = make(samples(4), [5, 6, 7, 8]), make(samples(4), [5, 6, 7, 8])
    assert torch.equal(one.images, two.images)
    assert [(w.kind, w.tasks, w.images.tolist()) for w in one.works] == [
        (w.kind, w.tasks, w.images.tolist()) for w in two.works
    ]


def test_images_are_scaled_and_their_padding_is_marked() -> None:
    batch = maker("panoptic")(samples(1, height=16, width=32), [0])
    assert batch.images.shape == (1, 3, 32, 32) and 0 <= batch.images.min() <= batch.images.max() <= 1
    assert not batch.padding[0, :16].any() and batch.padding[0, 16:].all()
    assert batch.keys == ("tiny-0",)
