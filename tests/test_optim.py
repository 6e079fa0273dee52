"""Laws of the optimiser: who decays, who is slower, and the rate of every step."""

import math
import re

import pytest
from tiny import model

from schemas.jobs import BackboneConfig, OptimConfig
from xdecoder.training.optim import learning_rate, make_optimizer

CONFIG = OptimConfig(lr=1.0, weight_decay=0.05, backbone_scale=0.1, text_scale=0.25, warmup_steps=0)


def test_every_weight_is_in_one_group_with_its_decay_and_its_scale() -> None:
    of = model()
    optimizer = make_optimizer(of, CONFIG)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(group_of) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert len(group_of) == len(list(of.parameters()))
    for name, parameter in of.named_parameters():
        group = group_of[id(parameter)]
        scale = {"backbone": 0.1, "text": 0.25}.get(name.split(".")[0], 1.0)
        assert group["scale"] == scale and group["lr"] == scale, name
        assert group["weight_decay"] == (0.05 if decays(name) else 0), name


def decays(name: str) -> bool:
    """Matrices and convolutions do; biases, norms, embeddings, positions and scales do not."""
    if not name.endswith(".weight"):
        return False
    free = ("norm", "embedding", "contents", "positions", "level_embed", "query_text_context", "bn")
    return not any(word in name for word in free) and not is_group_norm(name)


def is_group_norm(name: str) -> bool:
    """Convolution and norm stand side by side without names in the pixel decoder and in downsampling."""
    return bool(re.match(r"pixel_decoder\.(laterals|outputs)\.\d+\.1\.", name)) or "downsample.2" in name


def test_swins_tables_of_places_do_not_decay() -> None:
    small = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "img_size": 64}
    of = model(backbone=BackboneConfig(name="swin_tiny_patch4_window7_224", options=small))
    tables = {id(p) for n, p in of.named_parameters() if n.endswith("relative_position_bias_table")}
    groups = make_optimizer(of, CONFIG).param_groups
    assert [g["weight_decay"] for g in groups for p in g["params"] if id(p) in tables] == [0] * 4


def test_a_frozen_weight_is_left_out() -> None:
    of = model()
    of.backbone.requires_grad_(False)
    held = {id(p) for group in make_optimizer(of, CONFIG).param_groups for p in group["params"]}
    assert held == {id(p) for p in of.parameters() if p.requires_grad}


def rates(steps: int, **changes: object) -> list[float]:
    config = CONFIG.model_copy(update={"lr": 0.5, **changes})
    return [learning_rate(step, steps, config) for step in range(steps)]


def test_warm_up_rises_in_equal_steps_to_the_full_rate() -> None:
    got = rates(8, warmup_steps=4, schedule="constant")
    assert got == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5])


def test_multistep_drops_by_ten_at_each_milestone() -> None:
    got = rates(10, schedule="multistep", milestones=(0.5, 0.8))
    assert got == pytest.approx([0.5] * 5 + [0.05] * 3 + [0.005] * 2)


def test_poly_and_cosine_follow_their_formulas() -> None:
    for step, (poly, cosine) in enumerate(
        zip(rates(20, schedule="poly"), rates(20, schedule="cosine"), strict=True)
    ):
        assert poly == pytest.approx(0.5 * (1 - step / 20) ** 0.9)
        assert cosine == pytest.approx(0.25 * (1 + math.cos(math.pi * step / 20)))


@pytest.mark.parametrize("schedule", ["multistep", "poly", "cosine", "constant"])
def test_no_schedule_ever_rises_or_reaches_zero(schedule: str) -> None:
    got = rates(50, schedule=schedule)
    assert all(a >= b > 0 for a, b in zip(got, got[1:], strict=False))
