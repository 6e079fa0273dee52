"""What each Ray Train worker does: build, restore, train, save, report. Rank 0 writes the journal."""

import ctypes
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ray.train
import ray.train.torch
import torch

from jobs import console, journal
from pipelines.catalog import Catalog
from pipelines.stream import training_stream
from schemas.jobs import PretrainJob
from xdecoder.prompts import Vocabulary
from xdecoder.training import checkpoint
from xdecoder.training.trainer import StepReport, Trainer

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True, kw_only=True)
class Duty:
    """What every worker is told. `version` is a dataset version's id; `journal` and `model` are written."""

    job: PretrainJob
    store: Path
    version: str
    vocabulary: Vocabulary
    cpus: int
    journal: Path
    model: Path


def work(duty: Duty) -> None:
    """Train to the last step, from the run's newest checkpoint if there is one, then export the model."""
    console.configure()
    _keep_freed_memory()
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
    _restore(trainer)
    _train(trainer, duty)
    if trainer.rank == 0:
        _export(trainer, duty.model)


def _keep_freed_memory() -> None:
    """Have glibc keep what tensors free instead of handing it back and faulting it in again every step.

    In the demo that takes the page faults of a step from 9000 to 300, a twentieth of its time. Pieces above
    32 MB are still handed back (the most that `M_MMAP_THRESHOLD`, mallopt(3), takes). Elsewhere than with
    glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, size_bytes in ((_M_MMAP_THRESHOLD, 32 * 2**20), (_M_TRIM_THRESHOLD, 2**30)):
            mallopt(parameter, size_bytes)


def _restore(trainer: Trainer) -> None:
    saved = ray.train.get_checkpoint()
    if saved is not None:
        with saved.as_directory() as folder:
            checkpoint.restore(trainer, Path(folder))
        log.info("rank %d goes on from step %d", trainer.rank, trainer.step)


def _train(trainer: Trainer, duty: Duty) -> None:
    train = duty.job.train
    data = Catalog(duty.store, duty.job.dataset.name).open(duty.version)
    streams = {
        stream: training_stream(
            data,
            stream=stream,
            seed=train.seed,
            global_batch=getattr(train.batch, stream),
            rank=trainer.rank,
            world_size=trainer.world_size,
            position=trainer.positions[stream],
            workers=train.loader_workers,
            make_batch=trainer.make_batch(stream),
        )
        for stream in trainer.streams
    }

    def on_log(report: StepReport) -> None:
        if trainer.rank == 0:
            journal.append(duty.journal, report.step, report.metrics)

    while trainer.step < train.steps:
        following = (trainer.step // train.checkpoint_every + 1) * train.checkpoint_every
        trainer.fit(streams, until=min(following, train.steps), on_log=on_log)
        _save(trainer)


def _save(trainer: Trainer) -> None:
    # Every rank hands in its own folder (its random states); Ray Train merges them into one checkpoint.
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        checkpoint.save(trainer, Path(folder))
        saved = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"step": trainer.step}, checkpoint=saved)


def _export(trainer: Trainer, folder: Path) -> None:
    """The folder appears when the model in it is whole."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    checkpoint.export(trainer, unfinished)
    unfinished.rename(folder)
