"""A model and a dataset version -> the table of results, computed once and kept in the store.

What is measured is named by its content (the model's files, the dataset version, the settings), so that a
champion and a candidate are compared on the same data, and no figure is computed twice.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pyarrow.compute as pc
import torch

from jobs import cluster, console
from jobs.console import Outcome
from jobs.journal import MetricRow
from jobs.store import catalog_of, digest, digest_files
from jobs.tracking import Tracker, connect
from pipelines.catalog import DatasetVersion
from pipelines.stream import admitted, read_samples
from schemas.jobs import EvaluateConfig, EvaluateJob
from schemas.records import Sample
from schemas.tasks import NEEDS, STREAM_FIELDS, Stream, Task
from xdecoder.inference.evaluator import Evaluation, Result, evaluate
from xdecoder.inference.predictor import Predictor

log = logging.getLogger(__name__)
MAX_CPUS = 8  # chosen by us: an evaluation runs on one machine and should not take a whole big one


@dataclass(frozen=True, kw_only=True)
class Order:
    """All that an evaluation is computed from, as it travels to the machine that computes it."""

    model: Path
    store: Path
    dataset: str
    version: str
    config: EvaluateConfig
    cpus: int

    @property
    def folder(self) -> Path:
        """Where the result is kept."""
        return (
            self.store
            / "evaluations"
            / digest(digest_files(self.model), self.dataset, self.version, self.config)
        )


def run(job: EvaluateJob, store: Path, source: str) -> Outcome:
    """Evaluate a registered model and log the table in a run of its own."""
    tracker = connect(store)
    data = catalog_of(store, job.dataset.name).open(job.dataset.version)
    version = tracker.version(job.registered_model, job.version)
    model = tracker.fetch(version, store / "models")
    with cluster.session():
        folder = measure(model, store, job.dataset.name, data, job.evaluate)
    name = f"evaluate {version.model} v{version.version}"
    evaluation = Evaluation.load(folder)
    home = tracker.start(job.registered_model, name, job.model_dump(mode="json"), {"job_file": source})
    tracker.log_dataset(
        home, name=job.dataset.name, version=data.id, profile=data.profile(), context="evaluation"
    )
    with tracker.running(home):
        log_results(tracker, home, evaluation.results, folder, step=0)
    facts = {"model": version.model, "version": version.version, "dataset": f"{job.dataset.name}@{data.id}"}
    return Outcome(facts=facts | {"kept in": str(folder)}, tables={"results": rows_of(evaluation.results)})


def measure(model: Path, store: Path, dataset: str, data: DatasetVersion, config: EvaluateConfig) -> Path:
    """The folder with the evaluation of an exported model: from the store, else made now, on Ray."""
    import ray

    cpus = min(MAX_CPUS, int(max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])))
    order = Order(
        model=model, store=store, dataset=dataset, version=data.id, config=config, cpus=max(1, cpus)
    )
    if order.folder.is_dir():
        log.info("already evaluated: %s", order.folder)
        return order.folder
    gpus = 1 if cluster.resources().get("GPU", 0) else 0
    log.info("evaluating %s on %s of %s@%s", ", ".join(config.tasks), config.split, dataset, data.id)
    cluster.call(_evaluate, order, cpus=order.cpus, gpus=gpus)
    return order.folder


def rows_of(results: Sequence[Result]) -> list[dict[str, object]]:
    """Results as a table: task, metric, value, chance, examples."""
    return [asdict(result) for result in results]


def log_results(tracker: Tracker, run: str, results: Sequence[Result], folder: Path, *, step: int) -> None:
    """Log the values as metrics `val/<task>/<metric>` and the evaluation's files with the run."""
    metrics = {f"val/{result.task}/{result.metric}": result.value for result in results}
    tracker.log_metrics(run, [MetricRow(step=step, time=time.time(), metrics=metrics)])
    tracker.log_files(run, folder, "evaluation")


def _evaluate(order: Order) -> None:
    """Runs in a Ray task."""
    console.configure()
    torch.set_num_threads(order.cpus)
    data = catalog_of(order.store, order.dataset).open(order.version)
    examine(order.model, data, order.config, order.folder)


def examine(model: Path, data: DatasetVersion, config: EvaluateConfig, folder: Path) -> Evaluation:
    """Evaluate an exported model in this process; the folder appears when everything in it is written."""
    predictor = Predictor.load(model, device="cuda" if torch.cuda.is_available() else "cpu")
    samples = {stream: partial(_samples, data, stream, config) for stream in _streams(config)}
    taxonomy = data.taxonomy(seen_only=False)
    evaluation = evaluate(predictor, samples, config, taxonomy, _Bars())
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    (unfinished / "pictures").mkdir(parents=True)
    evaluation.save(unfinished)
    for name, picture in evaluation.pictures:
        picture.save(unfinished / "pictures" / f"{name}.png")
    try:
        unfinished.rename(folder)
    except OSError:  # another process evaluated the same meanwhile: its folder is as good
        shutil.rmtree(unfinished)
    return evaluation


def examinable(data: DatasetVersion, config: EvaluateConfig) -> tuple[Task, ...]:
    """Those of the tasks for which the images that would be looked at tell the truth, say when few are."""
    told = set()
    for stream, fields in STREAM_FIELDS.items():
        looked_at = admitted(data, config.split, stream).sort_by("key").slice(0, config.limit or None)
        told |= {field for field in fields if pc.any(pc.greater(looked_at[field], 0)).as_py()}
    return tuple(task for task in config.tasks if NEEDS[task] in told)


def _streams(config: EvaluateConfig) -> list[Stream]:
    needed = {NEEDS[task] for task in config.tasks}
    return [stream for stream, fields in STREAM_FIELDS.items() if needed & set(fields)]


def _samples(data: DatasetVersion, stream: Stream, config: EvaluateConfig) -> Iterator[Sample]:
    return read_samples(data, split=config.split, stream=stream, limit=config.limit)


class _Bars:
    """A progress for each name the evaluator speaks of."""

    def __init__(self) -> None:
        self.bars: dict[str, console.Progress] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.bars:
            self.bars[what] = console.Progress(f"evaluate {what}", total, unit="images")
        self.bars[what].update(done)
