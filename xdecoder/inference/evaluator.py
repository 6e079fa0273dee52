"""A whole evaluation: every task's exam over one dataset version, as a table, as rows per image, and as
pictures.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from schemas.jobs import EvaluateConfig
from schemas.masks import Array
from schemas.records import Sample
from schemas.tasks import NEEDS, Stream, Task
from schemas.taxonomy import Taxonomy
from xdecoder.inference.exams import Sitting, Subject
from xdecoder.inference.metrics import Metric
from xdecoder.inference.predictor import Predictor
from xdecoder.tasks import TABLE

log = logging.getLogger(__name__)
DOCUMENT, ROWS = "evaluation.json", "rows.npz"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table; `chance` is None where the metric has no chance level."""

    task: Task
    metric: str
    value: float
    chance: float | None
    examples: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results, and for each task its metric with rows per image; pictures of predictions beside truths."""

    results: tuple[Result, ...]
    metrics: Mapping[Task, Metric]
    subject: Subject
    pictures: tuple[tuple[str, Image.Image], ...] = ()

    def value(self, task: Task, metric: str) -> Result:
        """One row. Raises `ValueError` that names those there are."""
        for result in self.results:
            if (result.task, result.metric) == (task, metric):
                return result
        there = sorted(f"{r.task}/{r.metric}" for r in self.results)
        raise ValueError(f"the evaluation has no {task}/{metric}; it has {there}")

    def save(self, folder: Path) -> None:
        """Write `evaluation.json` and `rows.npz`."""
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "results": [asdict(result) for result in self.results],
            "taxonomy": self.subject.taxonomy.model_dump(mode="json"),
            "kinds": self.subject.kinds,
        }
        (folder / DOCUMENT).write_text(json.dumps(document, indent=1), encoding="utf-8")
        arrays = {f"{task}/{name}": a for task, m in self.metrics.items() for name, a in m.export().items()}
        np.savez_compressed(folder / ROWS, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: Path) -> "Evaluation":
        """An evaluation that `save` wrote, without its pictures. Raises `ValueError` where there is none."""
        if not (folder / DOCUMENT).is_file():
            raise ValueError(f"{folder} holds no evaluation: {DOCUMENT} is missing")
        document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
        taxonomy = Taxonomy.model_validate(document["taxonomy"])
        subject = Subject(taxonomy=taxonomy, kinds=tuple(document["kinds"]))
        results = tuple(Result(**row) for row in document["results"])
        metrics: dict[Task, Metric] = {
            task: TABLE[task].metric(subject) for task in {r.task for r in results}
        }
        with np.load(folder / ROWS) as arrays:
            for task, metric in metrics.items():
                metric.load(
                    {k.partition("/")[2]: arrays[k] for k in arrays.files if k.startswith(f"{task}/")}
                )
        return cls(results=results, metrics=metrics, subject=subject)

    def gains(self, champion: "Evaluation", task: Task, metric: str, resamples: int, seed: int = 0) -> Array:
        """Candidate minus champion on `resamples` draws of the same images, float64[resamples].

        Paired bootstrap over images. Raises `ValueError` where one of the two was not examined on the task,
        the metric cannot be recomputed from rows, or the two did not see the same number of images.
        """
        for who, of in (("candidate", self), ("champion", champion)):
            if task not in of.metrics:
                raise ValueError(
                    f"the {who} was not examined on {task!r}, only on {sorted(of.metrics)}: "
                    "add it to evaluate.tasks, or leave out the rule"
                )
        ours, theirs = self.metrics[task], champion.metrics[task]
        count = _images(ours)
        if count != _images(theirs):
            raise ValueError(f"{task}: candidate saw {count} images, champion {_images(theirs)}")
        if metric not in ours.compute():
            raise ValueError(f"{task}/{metric} has no rows per image; use one of {sorted(ours.compute())}")
        rng = np.random.default_rng(seed)
        draws = (
            np.bincount(rng.integers(0, count, count), minlength=count).astype(float)
            for _ in range(resamples)
        )
        return np.array([ours.compute(w)[metric] - theirs.compute(w)[metric] for w in draws])


def evaluate(
    predictor: Predictor,
    samples: Mapping[Stream, Callable[[], Iterator[Sample]]],
    config: EvaluateConfig,
    taxonomy: Taxonomy,
    progress: Progress,
) -> Evaluation:
    """Sit the exams of `config.tasks` that the samples have annotations for.

    samples     for each stream, a function that starts reading its samples anew
    taxonomy    all classes, with the unseen marked
    progress    called with task, done, total

    Raises `ValueError` where a wanted task has no sample at all.
    """
    results: list[Result] = []
    metrics: dict[Task, Metric] = {}
    drawn: list[tuple[str, Image.Image]] = []
    subject = Subject(taxonomy=taxonomy, kinds=_kinds(samples, config))
    for task in config.tasks:
        row = TABLE[task]
        chosen = [s for s in samples[row.stream]() if getattr(s.meta, NEEDS[task])]
        if not chosen:
            raise ValueError(
                f"task {task!r}: no sample of the split has {NEEDS[task]}; leave it out of evaluate.tasks"
            )

        def tell(done: int, total: int, task: Task = task) -> None:
            progress(task, done, total)

        sitting = Sitting(predictor=predictor, config=config, subject=subject, progress=tell)
        exam = row.exam(sitting, chosen)
        metrics[task] = exam.metric
        results += [
            Result(task=task, metric=name, value=value, chance=exam.chance.get(name), examples=exam.examples)
            for name, value in exam.scores.items()
        ]
        drawn += [(f"{task}-{s.key}", row.picture(sitting, s)) for s in chosen[: config.pictures]]
    return Evaluation(results=tuple(results), metrics=metrics, subject=subject, pictures=tuple(drawn))


def _kinds(
    samples: Mapping[Stream, Callable[[], Iterator[Sample]]], config: EvaluateConfig
) -> tuple[str, ...]:
    if "vqa" not in config.tasks:
        return ()
    asked = (q for sample in samples[TABLE["vqa"].stream]() for q in sample.meta.questions)
    return tuple(sorted({question.kind for question in asked}))


def _images(metric: Metric) -> int:
    arrays = metric.export()
    return len(arrays.get("rows", arrays.get("truths", ())))
