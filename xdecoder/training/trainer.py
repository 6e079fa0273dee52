"""The training loop: a step takes a segmentation batch and an image-text batch, and changes the weights once.

It knows nothing of clusters or trackers: who runs it hands in the streams and takes the reports.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from schemas.jobs import LossConfig, ModelConfig, TrainConfig
from schemas.tasks import Stream
from xdecoder.model.xdecoder import XDecoder, columns
from xdecoder.prompts import Vocabulary, tokenize
from xdecoder.tasks import TABLE, BatchMaker, Setting
from xdecoder.training.batch import Batch, to_device
from xdecoder.training.losses import Scene, total
from xdecoder.training.optim import learning_rate, make_optimizer

log = logging.getLogger(__name__)


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
        objective = Objective(self.model, train.loss, vocabulary).to(device)
        parallel = dist.is_initialized() and world_size > 1
        self.objective: nn.Module = (
            DistributedDataParallel(objective, find_unused_parameters=True) if parallel else objective
        )
        self.optimizer = make_optimizer(self.model, train.optim)
        self.step = 0
        self.positions: dict[Stream, int] = {"segmentation": 0, "image_text": 0}
        torch.manual_seed(train.seed * 1_000_003 + rank)  # then each rank draws its own points

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams that the tasks of this training need."""
        return tuple(s for s in self.positions if any(TABLE[t].stream == s for t in self.config.tasks))

    def make_batch(self, stream: Stream) -> BatchMaker:
        setting = Setting(model=self.model.config, train=self.config, vocabulary=self.vocabulary)
        return BatchMaker(stream=stream, setting=setting)

    def fit(
        self,
        streams: Mapping[Stream, Iterator[tuple[Batch, int]]],
        *,
        until: int,
        on_log: Callable[[StepReport], None],
    ) -> None:
        """Train until `step == until`. Reports every `log_every` steps and at the end.

        Raises `NonFiniteLoss`; the weights are then those before the bad step.
        """
        window = _Window(self.config)
        self.objective.train()
        while self.step < until:
            started = time.perf_counter()
            drawn = {name: next(stream) for name, stream in streams.items()}
            waited = time.perf_counter() - started
            metrics = self.train_step(tuple(batch for batch, _ in drawn.values()))
            self.positions |= {name: position for name, (_, position) in drawn.items()}
            window.add(metrics, waited, time.perf_counter() - started)
            if self.step % self.config.log_every == 0 or self.step == until:
                on_log(window.report(self.step))

    def train_step(self, batches: tuple[Batch, ...]) -> dict[str, float]:
        """One change of the weights; returns the loss, its terms, the gradient norm and the rate."""
        rate = learning_rate(self.step, self.config.steps, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        with torch.autocast(
            self.device.split(":")[0], torch.bfloat16, enabled=self.config.precision == "bf16"
        ):
            terms = self.objective(to_device(batches, self.device))
            loss = total(terms, self.config.loss)
        self._check("loss", loss, terms, batches)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self._check("the gradient's norm", norm, terms, batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # a term that is exactly zero had nothing to learn from, and would only dilute the logged mean
        values = {f"loss/{name}": value.item() for name, value in terms.items() if value != 0}
        return {"loss": loss.item(), "lr": rate, "grad_norm": norm.item()} | values

    def _check(
        self, what: str, value: Tensor, terms: Mapping[str, Tensor], batches: tuple[Batch, ...]
    ) -> None:
        if torch.isfinite(value):
            return
        self.optimizer.zero_grad(set_to_none=True)
        values = ", ".join(f"{name} {term.item():.4g}" for name, term in terms.items())
        keys = [key for batch in batches for key in batch.keys]
        raise NonFiniteLoss(f"step {self.step}: {what} is {value.item()} ({values}); samples {keys}")


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
