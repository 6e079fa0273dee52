"""The training loop: a step takes a segmentation batch and an image-text batch (of each so many as are
accumulated), and changes the weights once.

It knows nothing of clusters or trackers: who runs it hands in the streams and takes the reports.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from schemas.jobs import LossConfig, ModelConfig, TrainConfig
from schemas.tasks import Stream
from xdecoder.model.xdecoder import XDecoder, columns
from xdecoder.prompts import Vocabulary, tokenize
from xdecoder.tasks import TABLE, BatchMaker, Setting
from xdecoder.training import joined, parallel
from xdecoder.training.batch import Batch, to_device
from xdecoder.training.joined import Rehearsal
from xdecoder.training.losses import Scene, total
from xdecoder.training.optim import learning_rate, make_optimizer

log = logging.getLogger(__name__)
Micro = tuple[Batch, ...]  # of each stream one


class NonFiniteLoss(RuntimeError):
    """A loss or gradient that is NaN or infinite: the message has every term and the keys of the samples."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one logged interval was like: the mean of every loss term, rates, and where the time went."""

    step: int
    metrics: dict[str, float]


class Objective(nn.Module):
    """Batches -> loss terms, as one module so that DistributedDataParallel sees one forward."""

    class_ids: Tensor
    class_columns: Tensor
    answer_ids: Tensor

    def __init__(self, model: XDecoder, config: LossConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.model, self.config = model, config
        names, closed = vocabulary.taxonomy.names, model.config.classes
        if closed and closed != len(names):
            raise ValueError(f"model.classes is {closed}, the dataset has {len(names)} classes with masks")
        self.class_texts = model.class_texts(names)
        self.register_buffer("class_ids", self.class_texts.ids, persistent=False)
        self.register_buffer("class_columns", columns(names, names), persistent=False)
        answers = tokenize(vocabulary.answers, model.config.context)
        self.register_buffer("answer_ids", answers, persistent=False)

    def forward(self, batches: tuple[Batch, ...]) -> dict[str, Tensor]:
        model = self.model
        works = [work for batch in batches for work in batch.works]
        classes, tasks, answers, *texts = model.text.several(
            [self.class_ids, model.task_ids, self.answer_ids, *(work.targets.texts for work in works)]
        )
        of_work = dict(zip(map(id, works), texts, strict=True))
        terms: dict[str, Tensor] = {}
        for batch in batches:
            scene = Scene(
                model=model,
                pixels=model.encode(batch.images, batch.padding),
                classes=self._classes(classes.sentence),
                answers=answers.sentence,
                tasks=tasks.sentence,
                config=self.config,
            )
            for work in batch.works:
                terms |= TABLE[work.kind].loss(scene, work, of_work[id(work)])
        return terms

    def _classes(self, sentences: Tensor) -> Tensor:
        """What `XDecoder.class_logits` takes for the classes of the training."""
        closed = self.model.config.classes
        return self.class_columns if closed else self.class_texts.embed(sentences)


class Trainer:
    """A model in training and everything that changes with it.

    step        steps done
    positions   samples taken from each stream so far, over all ranks
    rejects     samples among them that could not be read
    average     of each weight, exponentially over steps; empty without `ema_decay`
    asked       whether this rank was asked to stop; it may be set from outside at any time
    stopping    whether any rank was, at the last step: all ranks see it at the same step
    rewound     the step whose loss was no number, and before which the training went back
    """

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        vocabulary: Vocabulary,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(train.seed)  # equal weights on every rank
        self.config, self.vocabulary = train, vocabulary
        self.rank, self.world_size, self.device = rank, world_size, device
        self.model = XDecoder(model).to(device)
        self.objective: nn.Module = Objective(self.model, train.loss, vocabulary).to(device)
        if train.activation_checkpointing:
            parallel.save_memory(self.model)
        if train.compile:
            parallel.compile_blocks(self.model)
        if dist.is_initialized() and world_size > 1:
            self.objective = parallel.distribute(self.objective, self.model, train.parallel, device)
        self.optimizer = make_optimizer(self.model, train.optim)
        self.step = 0
        self.positions: dict[Stream, int] = {"segmentation": 0, "image_text": 0}
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters() if train.ema_decay}
        self.asked = self.stopping = False
        self.rejects = self.skipped = 0
        self.rewound: int | None = None
        torch.manual_seed(train.seed * 1_000_003 + rank)  # then each rank draws its own points

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams that the tasks of this training need."""
        return tuple(s for s in self.positions if any(TABLE[t].stream == s for t in self.config.tasks))

    def make_batch(self, stream: Stream) -> BatchMaker:
        setting = Setting(model=self.model.config, train=self.config, vocabulary=self.vocabulary)
        return BatchMaker(stream=stream, setting=setting)

    def skip(self) -> None:
        """A stream of this rank has a sample that cannot be read; the next step tells the other ranks."""
        self.skipped += 1

    def fit(
        self,
        streams: Mapping[Stream, Iterator[tuple[Batch, int]]],
        *,
        until: int,
        on_log: Callable[[StepReport], None],
    ) -> None:
        """Train until `step == until`, or until a rank was asked to stop. Reports every `log_every` steps
        and at the end.

        Raises `NonFiniteLoss`; the weights are then those before the bad step, `positions` those after it.
        """
        window = _Window(self.config)
        self.objective.train()
        self.stopping = False
        while self.step < until and not self.stopping:
            started = time.perf_counter()
            drawn = [
                {name: next(stream) for name, stream in streams.items()}
                for _ in range(self.config.accumulate)
            ]
            waited = time.perf_counter() - started
            self.positions |= {name: position for name, (_, position) in drawn[-1].items()}
            metrics = self.train_step(*(tuple(batch for batch, _ in micro.values()) for micro in drawn))
            window.add(metrics, waited, time.perf_counter() - started)
            if self.step % self.config.log_every == 0 or self.step == until or self.stopping:
                on_log(window.report(self.step))

    def train_step(self, *micros: Micro) -> dict[str, float]:
        """One change of the weights; returns the loss, its terms, the gradient norm and the rate.

        The numbers are those of the joined batch of all ranks and micro-batches.
        """
        rate = learning_rate(self.step, self.config.steps, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        terms = self._gradients([to_device(micro, self.device) for micro in micros])
        norm = parallel.finish(self.objective, self.model.parameters(), self.config.optim.clip)
        said = norm.new_tensor([float(self.asked), float(self.skipped)])
        shared = joined.total(torch.cat((torch.stack([*terms.values()]), said)))
        means, sums = shared[: len(terms)] / joined.world(), shared[len(terms) :]
        *values, norm_value, asked, skipped = torch.cat((means, norm[None], sums)).tolist()
        metrics = dict(zip(terms, values, strict=True)) | {"grad_norm": norm_value}
        self.rejects, self.skipped = self.rejects + round(skipped), 0
        self._check(metrics, micros)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        self.step, self.stopping = self.step + 1, asked > 0
        # a term that is exactly zero had nothing to learn from, and would only dilute the logged mean
        return {name: value for name, value in metrics.items() if value or "/" not in name} | {"lr": rate}

    def _gradients(self, micros: Sequence[Micro]) -> dict[str, Tensor]:
        """Collect the gradients of the micro-batches; returns the loss and its terms, without gradient."""
        rehearsal, sums = Rehearsal(), dict[str, Tensor]()
        if len(micros) > 1:
            with torch.no_grad(), parallel.without_trace(self.objective, self.device):
                for part, micro in enumerate(micros):
                    with joined.rehearsing(rehearsal, part, playing=False):
                        self._terms(micro)
        for part, micro in enumerate(micros):
            last = part == len(micros) - 1
            with parallel.collecting(self.objective, last=last), self._scene(rehearsal, part, micros):
                terms = self._terms(micro)
                loss = total(terms, self.config.loss)
                loss.backward()
            named = {"loss": loss} | {f"loss/{name}": value for name, value in terms.items()}
            sums = {name: value.detach().float() + sums.get(name, 0) for name, value in named.items()}
        return sums

    def _scene(
        self, rehearsal: Rehearsal, part: int, micros: Sequence[Micro]
    ) -> AbstractContextManager[None]:
        return joined.rehearsing(rehearsal, part, playing=True) if len(micros) > 1 else nullcontext()

    def _terms(self, micro: Micro) -> dict[str, Tensor]:
        half = self.config.precision == "bf16"
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=half):
            terms: dict[str, Tensor] = self.objective(micro)
        return terms

    @torch.no_grad()
    def _average(self) -> None:
        if self.average:
            weights = [parallel.local(p) for p in self.model.parameters()]
            averages = [parallel.local(a) for a in self.average.values()]
            torch._foreach_lerp_(averages, weights, 1 - self.config.ema_decay)

    def _check(self, metrics: Mapping[str, float], micros: Sequence[Micro]) -> None:
        """All ranks see the same numbers, so they stop together."""
        bad = next((name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])), None)
        if bad is None:
            return
        self.optimizer.zero_grad(set_to_none=True)
        what = {"loss": "loss", "grad_norm": "the gradient's norm"}[bad]
        values = ", ".join(
            f"{name.removeprefix('loss/')} {value:.4g}" for name, value in metrics.items() if "/" in name
        )
        keys = [key for micro in micros for batch in micro for key in batch.keys]
        raise NonFiniteLoss(f"step {self.step}: {what} is {metrics[bad]} ({values}); samples {keys}")


class _Window:
    """Means over the steps since the last report."""

    def __init__(self, config: TrainConfig) -> None:
        self.samples = config.batch.segmentation + config.batch.image_text
        self.rows: list[dict[str, float]] = []

    def add(self, metrics: dict[str, float], waited_s: float, step_s: float) -> None:
        self.rows.append(metrics | {"data_wait_s": waited_s, "step_s": step_s})

    def report(self, step: int) -> StepReport:
        names = sorted({name for row in self.rows for name in row})
        means = {n: float(np.mean([row[n] for row in self.rows if n in row])) for n in names}
        self.rows = []
        return StepReport(step=step, metrics=means | {"samples_per_s": self.samples / means["step_s"]})
