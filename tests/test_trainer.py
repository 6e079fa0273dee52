"""Laws of the training loop: repeatable to the bit, honest reports, and no weight changed by a bad step."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tiny import MODEL, VOCABULARY, endless, samples, train_config

from benchmarks.loop import bare, ours
from schemas.jobs import OptimConfig
from schemas.tasks import TASKS
from xdecoder.training.optim import learning_rate
from xdecoder.training.trainer import NonFiniteLoss, StepReport, Trainer

SEGMENTATION = ("class_ce", "region_ce", "mask_bce", "mask_dice", "query_text")
REFERRING = ("grounding_ce", "grounding_bce", "grounding_dice")
IMAGE_TEXT = ("retrieval", "retrieval_backbone", "nouns", "captioning", "vqa")
LOGGED = (*SEGMENTATION, *REFERRING, *IMAGE_TEXT)


def trainer(**changes: Any) -> Trainer:
    return Trainer(MODEL, train_config(**changes), VOCABULARY)


def fit(of: Trainer, until: int, on_log: Callable[[StepReport], None] | None = None) -> list[StepReport]:
    """Train on samples in memory, from where the trainer stands."""
    reports: list[StepReport] = []
    streams = {s: endless(of.make_batch(s), samples(), position=of.positions[s]) for s in of.streams}
    of.fit(streams, until=until, on_log=on_log or reports.append)
    return reports


def batches(of: Trainer) -> tuple[Any, ...]:
    return tuple(next(endless(of.make_batch(s), samples()))[0] for s in of.streams)


def losses_of(reports: list[StepReport]) -> list[Mapping[str, float]]:
    return [{k: v for k, v in r.metrics.items() if k.startswith(("loss", "lr", "grad"))} for r in reports]


def test_the_same_seed_gives_the_same_training_to_the_last_bit() -> None:
    runs = []
    for seed in (0, 0, 1):
        of = trainer(seed=seed)
        runs.append((losses_of(fit(of, 3)), list(of.model.parameters())))
    (one, weights), (two, same), (three, _) = runs
    assert one == two != three
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def test_a_report_holds_every_term_the_rate_and_where_the_time_went() -> None:
    (report,) = fit(trainer(log_every=2), 2)
    assert report.step == 2
    timing = {"data_wait_s", "step_s", "samples_per_s"}
    assert set(report.metrics) == {"loss", "lr", "grad_norm", *timing, *(f"loss/{t}" for t in LOGGED)}
    assert all(math.isfinite(value) for value in report.metrics.values())
    assert 0 < report.metrics["data_wait_s"] < report.metrics["step_s"]


def test_reports_come_at_every_interval_and_at_the_end() -> None:
    of = trainer(log_every=2, tasks=("captioning",))
    assert [r.step for r in fit(of, 5)] == [2, 4, 5]


def test_the_loss_is_the_weighted_sum_of_the_logged_terms() -> None:
    of = trainer()
    metrics = of.train_step(batches(of))
    weighted = sum(getattr(of.config.loss, term) * metrics[f"loss/{term}"] for term in LOGGED)
    assert metrics["loss"] == pytest.approx(weighted, rel=1e-5)


def test_every_weight_learns() -> None:
    """The seven tasks together reach every part of the model; the original leaves some without gradient."""
    of = trainer()
    fit(of, 1)  # timm starts with residual branches at zero, which hold back the first gradient
    sum(of.objective(batches(of)).values()).backward()
    still = [n for n, p in of.model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_only_the_streams_that_the_tasks_need_are_asked_for() -> None:
    assert trainer(tasks=("vqa",)).streams == ("image_text",)
    assert trainer(tasks=("referring", "panoptic")).streams == ("segmentation",)
    assert trainer(tasks=TASKS).streams == ("segmentation", "image_text")


def test_positions_count_the_samples_taken() -> None:
    of = trainer()
    fit(of, 2)
    assert of.positions == {"segmentation": 8, "image_text": 8}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_weights_change(bad: float) -> None:
    of = trainer(tasks=("captioning", "vqa"))
    fit(of, 1)
    before = {name: p.clone() for name, p in of.model.state_dict().items()}
    spoil = of.model.caption_embed.register_forward_hook(lambda _, __, out: out * bad)
    with pytest.raises(NonFiniteLoss, match=r"step 1: loss is (nan|inf).*captioning.*vqa.*'tiny-0'"):
        fit(of, 2)
    spoil.remove()
    assert of.step == 1
    assert all(torch.equal(p, before[name]) for name, p in of.model.state_dict().items())
    fit(of, 2)  # and the training can go on
    assert of.step == 2


def test_a_gradient_that_is_no_number_stops_before_the_weights_change() -> None:
    of = trainer(tasks=("captioning",))
    before = {name: p.clone() for name, p in of.model.state_dict().items()}
    weight = of.model.caption_embed.weight
    spoil = weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"step 0: the gradient.*captioning.*'tiny-0'"):
        fit(of, 1)
    spoil.remove()
    assert of.step == 0
    assert all(torch.equal(p, before[name]) for name, p in of.model.state_dict().items())
    assert all(math.isfinite(v) for v in fit(of, 1)[0].metrics.values())


def test_clipping_bounds_the_norm_of_all_gradients_together() -> None:
    clip = 0.01
    of = trainer(optim=OptimConfig(clip=clip, warmup_steps=0, schedule="constant"))
    seen: list[float] = []
    of.optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            float(torch.stack([p.grad.norm() for p in of.model.parameters() if p.grad is not None]).norm())
        )
    )
    metrics = of.train_step(batches(of))
    assert metrics["grad_norm"] > 10 * clip, "the reported norm is that before clipping"
    assert seen == pytest.approx([clip], rel=1e-3)


def test_each_group_gets_its_share_of_the_scheduled_rate() -> None:
    optim = OptimConfig(lr=1e-3, backbone_scale=0.1, text_scale=0.5, warmup_steps=2, schedule="cosine")
    of = trainer(optim=optim, tasks=("captioning",))
    for step in range(3):
        metrics = of.train_step(batches(of))
        rate = learning_rate(step, of.config.steps, optim)
        assert metrics["lr"] == rate
        assert {group["lr"] for group in of.optimizer.param_groups} == {rate, 0.1 * rate, 0.5 * rate}


def test_half_precision_trains() -> None:
    of = trainer(precision="bf16")
    (report,) = fit(of, 1)
    assert all(math.isfinite(value) for value in report.metrics.values())
    assert all(p.dtype == torch.float32 for p in of.model.parameters())


def test_the_loop_does_to_the_weights_what_a_bare_one_does() -> None:
    """The least that trains, and ours with all that it knows: what `benchmarks.loop` compares in time."""
    weights = []
    for way in (bare, ours):
        of = trainer()
        drawn = {s: next(endless(of.make_batch(s), samples()))[0] for s in of.streams}
        assert way(of, drawn, 2) == 2
        weights.append(list(of.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
