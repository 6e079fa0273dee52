"""Training state on disk: everything that changes, so that going on is the same as never having stopped.

A run's folder holds `step-00000400`, `step-00000800` ...; in each, a file a rank and `checkpoint.json`, which
has their SHA-256. Such a folder takes its name when all of it is written. Under DDP rank 0's file holds the
weights, under FSDP2 each rank's its share of them; either is read on any number of ranks.

Where they lie, and how they come and go, is in `checkpoint_files.py`. Where that is elsewhere, each rank
sends its file there and rank 0 the manifest last; the folder then holds only what is on its way.
"""

import io
import json
import logging
import os
import random
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from xdecoder.model.files import ModelCard, save_model
from xdecoder.training import parallel
from xdecoder.training.checkpoint_files import DAMAGE, MANIFEST, Elsewhere, Files, Folder, Place, sha256
from xdecoder.training.trainer import Trainer

log = logging.getLogger(__name__)
STATE = "rank{rank}.pt"


class CheckpointError(RuntimeError):
    """Checkpoints that cannot be written, twice in a row."""


class Checkpoints:
    """The checkpoints of one run: written beside the training, found again, thinned out.

    keep    so many newest stay, and the one with the best metric
    facts   stands in each manifest: the resolved job, the dataset version
    there   where they lie, if not in the folder
    """

    def __init__(
        self, folder: Path, *, keep: int, facts: Mapping[str, Any], there: Files | None = None
    ) -> None:
        self.folder, self.keep, self.facts = folder, keep, dict(facts)
        self.place: Place = Folder(folder) if there is None else Elsewhere(there)
        # of its own, because it is used from a thread, beside the training's
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.sweeps = self.rank == 0 or there is not None  # else the ranks share the folder
        self.thread: threading.Thread | None = None
        self.failed = 0
        self.error: Exception | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, trainer: Trainer, metric: float | None = None) -> None:
        """Begin a checkpoint: training may go on when this returns. Every rank has to come.

        Raises `CheckpointError` where the two before failed; after one, the training goes on.
        """
        self.wait()
        state = _state(trainer)
        facts = {"step": trainer.step, "ranks": trainer.world_size, "shares": state["shares"]}
        facts |= {"metric": metric, **self.facts}
        self.thread = threading.Thread(target=self._run, args=(state, facts), name="checkpoint", daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until the checkpoint that was begun is there, or has failed. Raises as `save`."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failed > 1:
            self.failed = 0
            raise CheckpointError(
                f"checkpoints could not be written to {self.place} twice in a row: {self.error}; "
                "the run keeps those before them"
            )

    def restore(self, trainer: Trainer) -> Path | None:
        """Go on from the newest checkpoint that is whole; None where there is none. Every rank has to come.

        Raises `OSError` on all ranks where one cannot read what may be whole.
        """
        if self.rank == 0:
            for leftover in self.folder.glob(".step-*"):
                shutil.rmtree(leftover)
        names = self._exchange(self._attempt(self.place.names) if self.rank == 0 else None)[0]
        if isinstance(names, Exception):
            raise names
        for name in reversed(names):
            scratch = self.folder / f".{name}.{self.rank}"
            try:
                found = self._exchange(self._attempt(self._bring, name, scratch))
                faults = [one for one in found if isinstance(one, Exception)]
                for fault in faults:
                    if not isinstance(fault, DAMAGE):  # it may be whole, and cannot be read just now
                        raise fault
                if not faults:
                    restore(trainer, found[self.rank])
                    return self.folder / name
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            log.warning(
                "checkpoint %s/%s is damaged (%s): going back to the one before", self.place, name, faults
            )
        return None

    def _bring(self, name: str, scratch: Path) -> Path:
        """The folder of what this rank needs of a checkpoint. Raises where it is not what was written."""
        manifest, own = self.place.manifest(name), STATE.format(rank=self.rank)
        files: dict[str, str] = manifest["files"]
        needed = {STATE.format(rank=0), own} if manifest["shares"] == 1 else files.keys()
        return self.place.bring(name, {file: files[file] for file in needed & files.keys()}, scratch)

    def _run(self, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """The thread. What goes wrong in it is raised by the next `wait`."""
        try:
            self._write(state, facts)
        except Exception as error:  # a rank that is gone
            self.failed, self.error = 2, error

    def _write(self, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """All ranks come to the same end."""
        name = f"step-{facts['step']:08d}"
        unfinished = self.folder / f".{name}"
        mine = self._attempt(self._keep_part, state, unfinished)
        every = self._exchange(mine)
        if self.rank == 0 and not any(isinstance(part, Exception) for part in every):
            files = {STATE.format(rank=rank): part for rank, part in enumerate(every)}
            mine = self._attempt(self._commit, unfinished, name, {**facts, "files": files})
        errors = [part for part in self._exchange(mine) if isinstance(part, Exception)]
        self.failed = self.failed + 1 if errors else 0
        if errors:
            self.error = errors[0]
            log.warning("no checkpoint at step %d, the training goes on: %s", facts["step"], self.error)
        if self.sweeps:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _keep_part(self, state: dict[str, Any], unfinished: Path) -> str:
        digest = _write_part(state, unfinished, self.rank)
        self.place.take(unfinished / STATE.format(rank=self.rank), unfinished.name[1:], digest)
        return digest

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """What it returns, or why it could not: a full disk, a share that is away."""
        try:
            return action(*arguments)
        except Exception as error:
            return error

    def _exchange(self, mine: Any) -> list[Any]:
        """What each rank has, in rank order."""
        if self.group is None:
            return [mine]
        every = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(every, mine, group=self.group)
        return every

    def _commit(self, unfinished: Path, name: str, facts: dict[str, Any]) -> None:
        with (unfinished / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(facts, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        self.place.finish(unfinished, name)
        try:
            metrics = {name: self._metric(name) for name in self.place.names()}
            self.place.keep(metrics.keys() - self._superfluous(metrics))
        except OSError as error:
            log.warning("older checkpoints stay for now: %s", error)

    def _metric(self, name: str) -> float | None:
        try:
            metric: float | None = self.place.manifest(name)["metric"]
        except DAMAGE:
            return None
        return metric

    def _superfluous(self, metrics: Mapping[str, float | None]) -> set[str]:
        """Of all checkpoints, oldest first."""
        scores = {which: metric for which, metric in metrics.items() if metric is not None}
        best = max(scores, key=lambda which: scores[which], default=None)
        return set(list(metrics)[: -self.keep]) - {best}


def save(trainer: Trainer, folder: Path) -> None:
    """Write this rank's part of a checkpoint now."""
    _write_part(_state(trainer), folder, trainer.rank)


def restore(trainer: Trainer, folder: Path) -> None:
    """Go on from a checkpoint; a rank that the checkpoint does not know keeps its own random state.

    Raises `ValueError` where there is no checkpoint or it is of another model.
    """
    parts = [_load(folder / STATE.format(rank=0))]
    parts += [_load(folder / STATE.format(rank=rank)) for rank in range(1, parts[0]["shares"])]
    try:
        _fill(trainer.model.state_dict(), parts, "model")
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{folder}: the checkpoint is of another model: {error}") from None
    if trainer.average:
        _fill(trainer.average, parts, "average")
    _fill_optimizer(trainer, parts)
    shared = parts[0]
    trainer.step, trainer.positions = shared["step"], shared["positions"]
    trainer.rejects, trainer.rewound = shared["rejects"], shared["rewound"]
    own = folder / STATE.format(rank=trainer.rank)
    if own.is_file():
        set_chance(_load(own)["random"])


def export(trainer: Trainer, folder: Path) -> None:
    """Write the model for prediction: rank 0 does, all have to come."""
    weights = {name: parallel.full(tensor) for name, tensor in trainer.model.state_dict().items()}
    if trainer.config.export == "average":
        weights |= {name: parallel.full(tensor) for name, tensor in trainer.average.items()}
    if trainer.rank == 0:
        save_model(trainer.model, card(trainer), folder, weights)


def card(trainer: Trainer) -> ModelCard:
    """What prediction must know beside the weights."""
    return ModelCard(
        model=trainer.model.config,
        taxonomy=trainer.vocabulary.taxonomy,
        answers=trainer.vocabulary.answers,
        image_size=trainer.config.augment.image_size,
        image_text_size=trainer.config.augment.image_text_size,
    )


# ------------------------------------------------------------------------------------- from and to memory


def _state(trainer: Trainer) -> dict[str, Any]:
    """What this rank adds to a checkpoint, copied: the training goes on meanwhile.

    cut     names of the weights of which each rank's file has a share of the rows
    """
    weights = trainer.model.state_dict()
    cut = [name for name, tensor in weights.items() if isinstance(tensor, DTensor)]
    state: dict[str, Any] = {
        "step": trainer.step,
        "positions": dict(trainer.positions),
        "rejects": trainer.rejects,
        "rewound": trainer.rewound,
        "random": chance(),
        "shares": trainer.world_size if cut else 1,
        "cut": cut,
    }
    if cut or trainer.rank == 0:
        moments = {name: trainer.optimizer.state[p] for name, p in trainer.model.named_parameters()}
        state |= {"model": weights, "average": trainer.average, "optimizer": moments}
    return dict(tree_map_only(Tensor, lambda x: parallel.local(x).detach().to("cpu", copy=True), state))


def _fill(tensors: Mapping[str, Tensor], parts: Sequence[Mapping[str, Any]], section: str) -> None:
    """Copy what the parts hold together into the tensors, or into the shares of them that this rank has."""
    differ = tensors.keys() ^ parts[0][section].keys()
    if differ:
        raise KeyError(f"one of the two alone has {sorted(differ)[:8]}")
    for name, tensor in tensors.items():
        _copy(tensor, _whole([part[section][name] for part in parts], name in parts[0]["cut"]))


def _fill_optimizer(trainer: Trainer, parts: Sequence[Mapping[str, Any]]) -> None:
    for name, parameter in trainer.model.named_parameters():
        for key, value in parts[0]["optimizer"][name].items():
            like = torch.zeros_like(parameter if value.ndim else value, requires_grad=False)
            cut = name in parts[0]["cut"] and value.ndim > 0
            _copy(like, _whole([part["optimizer"][name][key] for part in parts], cut))
            trainer.optimizer.state[parameter][key] = like.to(parameter.device)


def _whole(shares: Sequence[Tensor], cut: bool) -> Tensor:
    return torch.cat(list(shares)) if cut else shares[0]


@torch.no_grad()
def _copy(target: Tensor, whole: Tensor) -> None:
    if target.shape != whole.shape:
        raise RuntimeError(f"size mismatch: {tuple(whole.shape)} for {tuple(target.shape)}")
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    own = target.to_local()  # rows in rank order, as torch.chunk cuts them
    rows = [len(chunk) for chunk in whole.chunk(dist.get_world_size())][: dist.get_rank()]
    own.copy_(whole[sum(rows) : sum(rows) + len(own)])


def chance() -> dict[str, Any]:
    """The state of every source of chance in this process."""
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }


def set_chance(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])


# ------------------------------------------------------------------------------------- from and to disk


def _write_part(state: Mapping[str, Any], folder: Path, rank: int) -> str:
    """Write one rank's file and return its SHA-256, of what can be read back."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STATE.format(rank=rank)
    with path.open("wb", buffering=0) as file:
        out = _Out(file)
        try:
            torch.save(state, cast(IO[bytes], out))
        except RuntimeError as error:  # torch's writer hides what the system said
            raise out.error or error from error
        os.fsync(file.fileno())
    return sha256(path)


class _Out:
    """A file that remembers why it could not be written."""

    def __init__(self, file: io.FileIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        left = memoryview(data).cast("B")
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, self.file.name)
            raise
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    loaded: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    return loaded
