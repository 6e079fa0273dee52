"""A dataset version -> a trained, evaluated, registered model, with Ray Train.

A run is named by its settings and its data. The same job submitted again goes on where an interruption left
it, also on other machines; once it has finished, it trains afresh under the next number.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from jobs import cluster, console, evaluate, mixing
from jobs.console import Outcome, Progress
from jobs.journal import Follower, MetricRow
from jobs.locks import training_lock
from jobs.store import catalog_of, code_version, digest, pull, push, read_json, write_json
from jobs.tracking import ModelVersion, Tracker, connect
from jobs.worker import Duty, Ending, MissingRank, work
from pipelines.catalog import DatasetVersion
from pipelines.stream import StreamError
from schemas.jobs import PretrainJob
from schemas.tasks import NEEDS
from xdecoder.inference.evaluator import Evaluation, Result
from xdecoder.prompts import Vocabulary
from xdecoder.training.checkpoint import CheckpointError

log = logging.getLogger(__name__)
# Settings that say where and how often, not what is learned: a run may be resumed with others.
PLACEMENT = {
    "num_workers",
    "cpus_per_worker",
    "use_gpu",
    "loader_workers",
    "loader_threads",
    "cache",
    "cache_gb",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_failures",
    "min_workers",
    "parallel",
    "activation_checkpointing",
    "validation",
    "profile",
    "compile",
    "rewind",
    "collective_timeout_s",
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training: what is asked (`source` is the job file), its folder in the store, its MLflow run."""

    job: PretrainJob
    source: str
    store: Path
    data: DatasetVersion
    folder: Path
    tracked: str

    @property
    def dataset(self) -> str:
        return f"{self.job.dataset.name}@{self.data.id}"

    def remember(self, *, finished: bool) -> None:
        """`run.json` in the folder is how a later submission knows what to do."""
        said = {"mlflow_run": self.tracked, "dataset": self.dataset, "finished": finished}
        write_json(self.folder / "run.json", said)
        push(self.folder / "run.json")


def run(job: PretrainJob, store: Path, source: str) -> Outcome:
    """Train, evaluate, register. What can be refused is refused before anything starts."""
    data = catalog_of(store, job.dataset.name).open(job.dataset.version)
    job = mixing.pinned(job, store)
    known = mixing.joined(job, store, data)
    _require_annotations(job, known)
    tracker = connect(store)
    name = _name(job, data)
    with training_lock(store, name), cluster.session():
        cpus = _cpus_per_worker(job)
        training = _begin(job, store, source, data, tracker, _folder(store, name))
        with tracker.running(training.tracked):
            started = time.monotonic()
            duty = _duty(training, known, cpus)
            _fit(training, duty, tracker)
            took = console.duration(time.monotonic() - started)
            kept = evaluate.measure(duty.model, store, job.dataset.name, data, job.evaluate)
            results = Evaluation.load(kept).results
            evaluate.log_results(tracker, training.tracked, results, kept, step=job.train.steps)
            version = _register(training, duty.model, tracker, results)
        training.remember(finished=True)
    facts = {"run": training.folder.name, "model": version.model, "version": version.version}
    facts |= {"dataset": training.dataset, "kept in": str(training.folder), "training took": took}
    return Outcome(facts=facts, tables={"results": evaluate.rows_of(results)})


def _require_annotations(job: PretrainJob, data: DatasetVersion) -> None:
    """Refuse a task for which the dataset has no training sample."""
    train = data.samples.filter(pc.equal(data.samples["split"], "train"))
    missing = [task for task in job.train.tasks if not pc.any(pc.greater(train[NEEDS[task]], 0)).as_py()]
    if missing:
        needed = sorted({NEEDS[task] for task in missing})
        raise ValueError(
            f"dataset {job.dataset.name}@{data.id} has no training sample with {needed} for {missing}; "
            "leave these out of train.tasks, or add a corpus that has them"
        )


def _cpus_per_worker(job: PretrainJob) -> int:
    """Refuse what can never be placed, before a run exists."""
    train = job.train
    share = int(cluster.resources().get("CPU", 0)) // train.num_workers
    cpus = train.cpus_per_worker or max(1, share)
    cluster.require(**_asked(job, cpus))
    return cpus


def _asked(job: PretrainJob, cpus: int) -> dict[str, int]:
    """The least that a cluster must have."""
    train = job.train
    workers = train.min_workers or train.num_workers
    return {"workers": workers, "cpus": cpus, "gpus": 1 if train.use_gpu else 0}


def _begin(
    job: PretrainJob, store: Path, source: str, data: DatasetVersion, tracker: Tracker, folder: Path
) -> Training:
    """The unfinished run in this folder, reopened, or a new one."""
    tracked = read_json(folder / "run.json").get("mlflow_run")
    if tracked and tracker.resume(tracked):
        log.info("run %s was interrupted and goes on", folder.name)
    else:
        log.info("run %s begins", folder.name)
        dataset = f"{job.dataset.name}@{data.id}"
        tags = {"job_file": source, "code_version": code_version(), "dataset": dataset}
        tracked = tracker.start(job.registered_model, folder.name, job.model_dump(mode="json"), tags)
        tracker.log_dataset(tracked, name=job.dataset.name, version=data.id, profile=data.profile())
    training = Training(job=job, source=source, store=store, data=data, folder=folder, tracked=tracked)
    training.remember(finished=False)
    return training


def _name(job: PretrainJob, data: DatasetVersion) -> str:
    """Of all runs with these settings and this data."""
    train = job.train.model_dump(mode="json", exclude=PLACEMENT)
    if not train["loss"]["nouns"]:  # a later setting: runs that began before it go on
        del train["loss"]["nouns"]
    mixed = job.model_dump(mode="json")["datasets"].items()
    learned = (job.model, train, job.registered_model, data.id, *mixed)
    return f"{job.name}-{digest(*learned)[:8]}"


def _folder(store: Path, name: str) -> Path:
    """Of the unfinished run of this name, or of the next one."""
    number = 1
    while read_json(pull(store / "runs" / f"{name}-{number}" / "run.json")).get("finished"):
        number += 1
    if number > 1:
        log.info("%d run(s) with these settings and this data have finished before: a new one", number - 1)
    return store / "runs" / f"{name}-{number}"


def _duty(training: Training, known: DatasetVersion, cpus: int) -> Duty:
    """`known` is what all datasets of the training know together."""
    return Duty(
        job=training.job,
        store=training.store,
        version=training.data.id,
        vocabulary=Vocabulary(taxonomy=known.taxonomy(seen_only=True), answers=known.card.answers),
        cpus=cpus,
        folder=training.folder,
    )


def _fit(training: Training, duty: Duty, tracker: Tracker) -> None:
    """Raises `ValueError` where the training failed or was asked to stop."""
    # Ray Train's own barrier, by which ranks learn of a pre-emption, would wait without end
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(training.job.train.collective_timeout_s)
    trainer = _trainer(training.job, duty)
    progress = Progress("training", training.job.train.steps, unit="steps")

    def show(row: MetricRow) -> None:
        if "loss" in row.metrics:
            loss, waited = row.metrics["loss"], row.metrics["data_wait_s"]
            rejects = f", {row.metrics['rejects']:.0f} rejects" if row.metrics.get("rejects") else ""
            progress.update(row.step, f"loss {loss:.4f}, data wait {waited:.3f} s{rejects}")
        else:  # a validation's
            values = ", ".join(f"{name} {value:.4g}" for name, value in row.metrics.items())
            log.info("step %d: %s", row.step, values)

    def deliver(rows: Sequence[MetricRow]) -> None:
        tracker.log_metrics(training.tracked, rows)
        push(duty.journal)
        for step in {row.step for row in rows if any(name.startswith("val/") for name in row.metrics)}:
            folder = duty.validation(step)
            tracker.log_files(training.tracked, folder / "pictures", f"validation/{folder.name}")

    if not duty.journal.is_file():
        pull(duty.journal)
    log.info("training: %d workers of %d CPUs", training.job.train.num_workers, duty.cpus)
    watched = cluster.watched(**_asked(training.job, duty.cpus))
    with Follower(duty.journal, show=show, deliver=deliver), stoppable(duty), watched:
        try:
            ending = trainer.fit().return_value
        except WorkerGroupError as error:
            raise _readable(error, training) from error
        except RayError as error:  # what ran the training died: out of memory, a lost head node
            raise ValueError(
                f"training was cut off: {str(error).strip().splitlines()[0]}\n"
                f"{training.folder} keeps its checkpoints; the same job submitted again goes on from the last"
            ) from error
    progress.close()
    if duty.profile.is_dir():
        tracker.log_files(training.tracked, duty.profile, "profile")
    _require_the_end(ending, training)


def _require_the_end(ending: Ending, training: Training) -> None:
    if ending.kind == "stopped":
        raise ValueError(
            f"training stopped as asked, at step {ending.step}; "
            "the same job submitted again goes on from there"
        )
    if ending.kind == "failed":
        raise ValueError(
            f"training failed: {ending.why}\n{training.folder} keeps its checkpoints; change what makes the "
            "loss grow (train.optim.lr, train.optim.clip, the samples named above): with other settings "
            "a new run begins"
        )


@contextmanager
def stoppable(duty: Duty) -> Iterator[None]:
    """Inside, SIGTERM (a pre-emption, `ray job stop`) means: save a checkpoint now, and stop."""
    duty.stop.unlink(missing_ok=True)

    def stop(number: int, frame: object) -> None:
        log.warning("SIGTERM: saving a checkpoint, then stopping")
        duty.stop.touch()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        duty.stop.unlink(missing_ok=True)


def _trainer(job: PretrainJob, duty: Duty) -> TorchTrainer:
    train = job.train
    fewest = train.min_workers or train.num_workers
    return TorchTrainer(
        lambda: work(duty),
        torch_config=TorchConfig(
            backend="nccl" if train.use_gpu else "gloo", timeout_s=train.collective_timeout_s
        ),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers if fewest == train.num_workers else (fewest, train.num_workers),
            use_gpu=train.use_gpu,
            resources_per_worker={"CPU": duty.cpus},
        ),
        run_config=RunConfig(
            name=duty.folder.name,
            storage_path=str(duty.folder.parent),
            failure_config=FailureConfig(max_failures=train.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _readable(error: WorkerGroupError, training: Training) -> Exception:
    """What the user can mend, without the stacks of all workers; anything else as it is."""
    for rank, failure in sorted(error.worker_failures.items()):
        if isinstance(failure, ValueError | MissingRank | CheckpointError | StreamError):
            return ValueError(
                f"training failed on rank {rank}: {failure}\n"
                f"{training.folder} keeps its checkpoints; the same job submitted again goes on from the last"
            )
    return error


def _register(training: Training, model: Path, tracker: Tracker, results: Sequence[Result]) -> ModelVersion:
    """The exported model as the next version, with its lineage."""
    lineage = {
        "dataset": training.dataset,
        "code_version": code_version(),
        "job_file": training.source,
        "run": training.folder.name,
    }
    measured = {f"{result.task}.{result.metric}": f"{result.value:.4f}" for result in results}
    name = training.job.registered_model
    version = tracker.register(training.tracked, name, model, lineage | measured)
    log.info("registered %s version %d", version.model, version.version)
    return version
