"""What each Ray Train worker does: build, restore, train, save, export. Rank 0 writes the journal.

Checkpoints lie in the run's folder and not in Ray Train's hands: a report is committed at its controller's
next look, so the last one before a crash would be lost.
"""

import datetime
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from jobs import console, journal, mixing
from jobs.gauge import Gauge
from jobs.store import catalog_of, remote
from pipelines.catalog import DatasetVersion
from pipelines.memory import keep_freed_memory
from schemas.jobs import PretrainJob, TrainConfig
from schemas.tasks import Stream
from xdecoder.prompts import Vocabulary
from xdecoder.training import checkpoint
from xdecoder.training.batch import Batch
from xdecoder.training.checkpoint import Checkpoints
from xdecoder.training.trainer import NonFiniteLoss, StepReport, Trainer

log = logging.getLogger(__name__)
# how long a thread that prepares batches may keep the training waiting for the interpreter; with Python's
# 5 ms a step seems to take longer, though no more than its noise (benchmarks.data_wait)
SWITCH_S = 0.0003
LOOK_S = 0.5  # how often rank 0 looks for a request to stop
ROLL_CALL_S = 20.0  # how long the ranks are waited for when one of them hangs


@dataclass(frozen=True, kw_only=True)
class Duty:
    """What every worker is told. `version` is a dataset version's id; `folder` is the run's."""

    job: PretrainJob
    store: Path
    version: str
    vocabulary: Vocabulary
    cpus: int
    folder: Path

    @property
    def journal(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def validation(self, step: int) -> Path:
        return self.folder / "validation" / f"step-{step:08d}"

    @property
    def profile(self) -> Path:
        return self.folder / "profile"

    @property
    def stop(self) -> Path:
        """While this file is there, the training is to save and stop."""
        return self.folder / "stop"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How it went: all steps done, stopped as asked, or a failure that trying again would only repeat."""

    kind: Literal["done", "stopped", "failed"]
    step: int
    why: str = ""


class MissingRank(RuntimeError):
    """A collective operation that not all ranks came to: the message names those that did not."""


def work(duty: Duty) -> Ending:
    """Train to the last step, from the run's newest whole checkpoint if there is one, then export the
    model.
    """
    console.configure()
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_S)
    torch.set_num_threads(duty.cpus)
    context = ray.train.get_context()
    trainer = Trainer(
        duty.job.model,
        duty.job.train,
        duty.vocabulary,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=str(ray.train.torch.get_device()),
    )
    facts = {"job": duty.job.model_dump(mode="json"), "dataset": f"{duty.job.dataset.name}@{duty.version}"}
    keep, there = duty.job.train.keep_checkpoints, remote(duty.checkpoints)
    checkpoints = Checkpoints(duty.checkpoints, keep=keep, facts=facts, there=there)
    if checkpoints.restore(trainer) is None:
        checkpoints.save(trainer)  # something to go back to; and a store that cannot be written shows at once
    log.info("rank %d of %d goes on from step %d", trainer.rank, trainer.world_size, trainer.step)
    if trainer.rank == 0:
        threading.Thread(target=listen, args=(trainer, duty), name="stop", daemon=True).start()
    ending = _train(trainer, checkpoints, duty)
    if ending.kind == "done":
        _export(trainer, duty.model)
    return ending


def _train(trainer: Trainer, checkpoints: Checkpoints, duty: Duty) -> Ending:
    train = duty.job.train
    data = catalog_of(duty.store, duty.job.dataset.name).open(duty.version, split="train")
    streams = _streams(trainer, data, duty)
    gauge = Gauge(trainer, data, elsewhere={*duty.job.datasets, *train.tars})
    written = journal.Writer(duty.journal)
    roll = dist.new_group(backend="gloo")
    notices: list[int | None] = []  # by when a machine will be taken away

    def on_log(report: StepReport) -> None:
        if trainer.rank == 0:
            written.append(report.step, report.metrics | gauge.read(report))
        notice = ray.train.get_preemption_info()  # a barrier: all ranks are told the same
        if notice is not None and notice.deadline_ms not in notices:
            notices.append(notice.deadline_ms)
            trainer.stopping = True

    while trainer.step < train.steps:
        known = len(notices)
        try:
            with missing_named(roll, lambda: f"step {trainer.step}"), _profiled(trainer, duty.profile):
                trainer.fit(streams, until=following(train, trainer.step), on_log=on_log)
        except NonFiniteLoss as error:
            if not rewind(trainer, checkpoints, error):
                return Ending(kind="failed", step=trainer.step, why=str(error))
            streams = _streams(trainer, data, duty)
            continue
        validated = train.validation.every and trainer.step % train.validation.every == 0
        metric = _validate(trainer, duty, written) if validated else None
        over = trainer.stopping or trainer.step == train.steps
        if validated or over or trainer.step % train.checkpoint_every == 0:
            checkpoints.save(trainer, metric)
        if trainer.stopping:
            checkpoints.wait()
            if len(notices) == known:
                return Ending(kind="stopped", step=trainer.step)
            log.warning("a machine will be taken away: a checkpoint is kept at step %d", trainer.step)
    checkpoints.wait()
    return Ending(kind="done", step=trainer.step)


def following(train: TrainConfig, step: int) -> int:
    """The next step after which there is something else to do than to train."""
    rhythms = (train.checkpoint_every, train.validation.every)
    due = [(step // every + 1) * every for every in rhythms if every]
    return min(*due, *(s for s in train.profile or () if s > step), train.steps)


def _validate(trainer: Trainer, duty: Duty, written: journal.Writer) -> float | None:
    """Examine the model as it would be exported, on rank 0, while the others wait; returns the metric that
    decides which checkpoint is best. What is drawn by chance meanwhile does not change the training.
    """
    from jobs import evaluate  # here: it brings MLflow, which a training without validation need not wait for

    validation, folder = duty.job.train.validation, duty.validation(trainer.step)
    before = checkpoint.chance()
    with tempfile.TemporaryDirectory(prefix="validation-") as model:
        checkpoint.export(trainer, Path(model))
        if trainer.rank:
            return None
        limits = {"limit": validation.limit, "pictures": validation.pictures}
        config = duty.job.evaluate.model_copy(update=limits)
        data = catalog_of(duty.store, duty.job.dataset.name).open(duty.version, split=config.split)
        config = config.model_copy(update={"tasks": evaluate.examinable(data, config)})
        shutil.rmtree(folder, ignore_errors=True)  # of a step that is done again
        results = evaluate.examine(Path(model), data, config, folder).results
    checkpoint.set_chance(before)
    values = {f"{result.task}/{result.metric}": result.value for result in results}
    written.append(trainer.step, {f"val/{name}": value for name, value in values.items()})
    if validation.metric and validation.metric not in values:
        raise ValueError(
            f"train.validation.metric: no {validation.metric!r} was measured; choose {sorted(values)}"
        )
    return values.get(validation.metric)


@contextmanager
def _profiled(trainer: Trainer, folder: Path) -> Iterator[None]:
    """A trace of what follows, where `train.profile` asks for it, of rank 0."""
    first, last = trainer.config.profile or (0, 0)
    if trainer.rank or not first <= trainer.step < last:
        yield
        return
    started = trainer.step
    with torch.profiler.profile() as profile:
        yield
    folder.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(folder / f"steps-{started}-{trainer.step}.json.gz"))


@contextmanager
def missing_named(roll: Any, where: Callable[[], str], patience_s: float = ROLL_CALL_S) -> Iterator[None]:
    """Inside, a collective operation that times out calls the roll: the ranks that do not answer within
    `patience_s` either are named by `MissingRank`. `roll` is a gloo group that is used for nothing else.
    """
    try:
        yield
    except RuntimeError as error:
        if dist.get_world_size() == 1 or "imed out" not in str(error):
            raise
        # rank 0 knows who is missing and speaks first: the others give it time
        patience = datetime.timedelta(seconds=patience_s * (1 if dist.get_rank() == 0 else 2))
        try:
            dist.monitored_barrier(roll, timeout=patience, wait_all_ranks=True)
        except RuntimeError as missing:
            who = str(missing).splitlines()[0]
            raise MissingRank(f"{where()}: a rank does not come: {who}") from error
        raise


def rewind(trainer: Trainer, checkpoints: Checkpoints, error: NonFiniteLoss) -> bool:
    """Go back to the last checkpoint, and on with the samples that follow the bad ones. Once in a
    training.
    """
    if not trainer.config.rewind or trainer.rewound is not None:
        return False
    bad, ahead, rejects = trainer.step, dict(trainer.positions), trainer.rejects
    checkpoints.wait()
    if checkpoints.restore(trainer) is None:
        return False
    trainer.positions, trainer.rejects, trainer.rewound = ahead, rejects, bad
    log.warning("%s; back to step %d, once, and past the samples since", error, trainer.step)
    return True


def listen(trainer: Trainer, duty: Duty) -> None:
    """Ask the trainer to stop when the driver says so, by a file in the run's folder."""
    while not duty.stop.exists():
        time.sleep(LOOK_S)
    trainer.asked = True


def _streams(trainer: Trainer, data: DatasetVersion, duty: Duty) -> dict[Stream, Iterator[tuple[Batch, int]]]:
    """From where the trainer stands."""
    return {
        stream: mixing.open_stream(
            duty.job,
            duty.store,
            data,
            stream,
            rank=trainer.rank,
            world_size=trainer.world_size,
            position=trainer.positions[stream],
            make_batch=trainer.make_batch(stream),
            on_skip=trainer.skip,
        )
        for stream in trainer.streams
    }


def _export(trainer: Trainer, folder: Path) -> None:
    """The folder appears when the model in it is whole. Every rank has to come."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    checkpoint.export(trainer, unfinished)
    if trainer.rank == 0:
        unfinished.rename(folder)
