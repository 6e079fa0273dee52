"""Laws of an evaluation: kept whole on disk, compared image by image, clear about what it cannot score."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_predictor import CARD
from tiny import TAXONOMY, bare, model, samples

from schemas.jobs import EvaluateConfig
from schemas.records import Sample
from schemas.tasks import NEEDS, STREAM_FIELDS, TASKS, Stream, Task
from xdecoder.inference.evaluator import Evaluation, evaluate
from xdecoder.inference.predictor import Predictor

CONFIG = EvaluateConfig(pictures=1, object_threshold=0, overlap_threshold=0, max_caption_tokens=4)


def read(of: list[Sample]) -> dict[Stream, Callable[[], Iterator[Sample]]]:
    return {stream: lambda: iter(of) for stream in STREAM_FIELDS}


def run(seed: int, of: list[Sample], config: EvaluateConfig = CONFIG) -> Evaluation:
    return evaluate(Predictor(model(seed), CARD), read(of), config, TAXONOMY, lambda *progress: None)


@pytest.fixture(scope="module")
def whole() -> Evaluation:
    return run(0, samples(4))


@pytest.fixture(scope="module")
def other() -> Evaluation:
    return run(1, samples(4))


def test_all_seven_tasks_are_examined_and_drawn(whole: Evaluation) -> None:
    assert {result.task for result in whole.results} == set(whole.metrics) == set(TASKS)
    assert [name for name, _ in whole.pictures] == [f"{task}-tiny-0" for task in TASKS]
    examples = {task: whole.metrics[task].examples for task in TASKS}
    assert examples == dict.fromkeys(TASKS, 4) | {"referring": 12, "vqa": 8}


def test_an_evaluation_comes_back_from_disk(whole: Evaluation, tmp_path: Path) -> None:
    whole.save(tmp_path)
    loaded = Evaluation.load(tmp_path)
    assert loaded.subject == whole.subject
    assert [r for r in loaded.results if not math.isnan(r.value)] == [
        r for r in whole.results if not math.isnan(r.value)
    ]
    assert len(loaded.results) == len(whole.results)
    for task in TASKS:
        np.testing.assert_equal(loaded.metrics[task].compute(), whole.metrics[task].compute())


def test_a_folder_without_an_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no evaluation"):
        Evaluation.load(tmp_path)


def test_a_model_gains_nothing_on_itself(whole: Evaluation, tmp_path: Path) -> None:
    whole.save(tmp_path)
    again = Evaluation.load(tmp_path)
    for task in TASKS:
        for metric, value in whole.metrics[task].compute().items():
            if math.isfinite(value):
                gains = whole.gains(again, task, metric, resamples=20)
                assert gains.shape == (20,) and np.nan_to_num(gains).tolist() == [0.0] * 20


def test_gains_on_a_task_that_one_did_not_sit_are_refused(whole: Evaluation) -> None:
    lacking = replace(whole, metrics={task: m for task, m in whole.metrics.items() if task != "vqa"})
    for ours, theirs, who in ((lacking, whole, "candidate"), (whole, lacking, "champion")):
        with pytest.raises(ValueError, match=f"the {who} was not examined on 'vqa', only on .*panoptic"):
            ours.gains(theirs, "vqa", "accuracy", 5)


def test_gains_are_those_of_the_same_images(whole: Evaluation, other: Evaluation) -> None:
    ours, theirs = whole.gains(other, "semantic", "mIoU", 50), other.gains(whole, "semantic", "mIoU", 50)
    np.testing.assert_allclose(ours, -theirs)
    assert ours.tolist() == whole.gains(other, "semantic", "mIoU", 50).tolist()
    assert ours.tolist() != whole.gains(other, "semantic", "mIoU", 50, seed=1).tolist()
    difference = whole.value("semantic", "mIoU").value - other.value("semantic", "mIoU").value
    assert ours.min() <= difference <= ours.max()


def test_what_cannot_be_compared_is_said(whole: Evaluation) -> None:
    fewer = run(0, samples(3), CONFIG.model_copy(update={"tasks": ("semantic",), "pictures": 0}))
    with pytest.raises(ValueError, match="semantic: candidate saw 4 images, champion 3"):
        whole.gains(fewer, "semantic", "mIoU", 5)
    with pytest.raises(
        ValueError, match="panoptic/PQ_stuff_with_instance_token has no rows per image; use one"
    ):
        whole.gains(whole, "panoptic", "PQ_stuff_with_instance_token", 5)
    with pytest.raises(ValueError, match="has no panoptic/mIoU; it has.*semantic/mIoU"):
        whole.value("panoptic", "mIoU")


@pytest.mark.parametrize("task", TASKS)
def test_a_task_without_its_annotation_is_an_error(task: Task) -> None:
    every = ("segments", "referring", "captions", "questions")
    lacking = [bare(sample, *(f for f in every if f != NEEDS[task])) for sample in samples(2)]
    config = CONFIG.model_copy(update={"tasks": (task,)})
    with pytest.raises(
        ValueError, match=f"task '{task}': no sample of the split has {NEEDS[task]}; leave it"
    ):
        run(0, lacking, config)


def test_samples_without_the_annotation_are_passed_over() -> None:
    config = CONFIG.model_copy(update={"tasks": ("semantic",), "pictures": 0})
    mixed = [bare(samples(1)[0], "captions"), *samples(2)]
    assert run(0, mixed, config).value("semantic", "mIoU").examples == 2


def test_a_closed_model_without_words_sits_the_exams_of_masks() -> None:
    """Also where the taxonomy has classes that its classifier has no column for."""
    green = tuple(c for c in TAXONOMY.categories if c.name == "green square")
    known = TAXONOMY.model_copy(
        update={"categories": tuple(c for c in TAXONOMY.categories if c not in green)}
    )
    unseen = tuple(c.model_copy(update={"seen": c not in green}) for c in TAXONOMY.categories)
    tasks: tuple[Task, ...] = ("semantic", "instance", "panoptic")
    of = model(classes=len(known.names), task_tokens=False, text=None)
    predictor = Predictor(of, CARD.model_copy(update={"model": of.config, "taxonomy": known}))
    config = CONFIG.model_copy(update={"tasks": tasks})
    taxonomy = TAXONOMY.model_copy(update={"categories": unseen})
    evaluation = evaluate(predictor, read(samples(4)), config, taxonomy, lambda *progress: None)
    assert {r.task for r in evaluation.results} == set(tasks)
    assert not any("GZS3" in r.metric for r in evaluation.results)
    with pytest.raises(ValueError, match="closed"):
        predictor.semantic([samples(1)[0].image], ["lava"])


def test_unseen_classes_are_void_in_the_main_scores_and_reported_on_their_own() -> None:
    categories = tuple(c.model_copy(update={"seen": c.name != "green square"}) for c in TAXONOMY.categories)
    taxonomy = TAXONOMY.model_copy(update={"categories": categories})
    config = CONFIG.model_copy(update={"tasks": ("semantic",), "pictures": 0})
    of = samples(4)
    evaluation = evaluate(Predictor(model(), CARD), read(of), config, taxonomy, lambda *progress: None)
    names = {result.metric for result in evaluation.results}
    assert names == {"mIoU", "GZS3_seen", "GZS3_unseen", "GZS3_harmonic"}
    rows = evaluation.metrics["semantic"].export()["rows"]  # intersection, truth and prediction of each class
    assert rows.shape[1] == len(TAXONOMY.names) - 1
    green = sum(s.area for sample in of for s in sample.meta.segments or () if s.category == "green square")
    labelled = sum(int((sample.labels > 0).sum()) for sample in of if sample.labels is not None)
    assert green > 0 and rows[..., 1].sum() == labelled - green
