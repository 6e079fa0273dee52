"""Benchmarks run as written, small: on a world of a few pictures, for a few steps."""

import math

import pytest
import torch
from tiny import TAXONOMY, endless, samples

from benchmarks import oracle, peers
from benchmarks.zeroshot import JOB, RECIPES, World, trial
from schemas.jobs import PretrainJob, load

SMALL = (
    "train.steps=2",
    "train.augment.image_size=32",
    "train.augment.image_text_size=32",
    "train.loss.points=32",
    "model.width=32",
    "model.ffn=32",
)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_the_zero_shot_benchmark_is_trained_and_scored(name: str) -> None:
    categories = tuple(c.model_copy(update={"seen": c.name != "green square"}) for c in TAXONOMY.categories)
    world = World(
        taxonomy=TAXONOMY.model_copy(update={"categories": categories}),
        train=lambda stream, seed, make: endless(make, samples(), position=seed),
        held_out=lambda: iter(samples(2)),
    )
    job = load(JOB, [*RECIPES[name], *SMALL])
    assert isinstance(job, PretrainJob)
    seen, unseen, harmonic, alone = trial(job, world, seed=1)
    assert all(0 <= score <= 100 for score in (seen, unseen, harmonic))
    expected = 2 * seen * unseen / (seen + unseen) if seen + unseen else 0
    assert math.isclose(harmonic, expected, abs_tol=1e-9)
    assert alone == 100  # ZS3: the one unseen class is the only label allowed, where it is


@pytest.mark.parametrize("recipe", peers.LATENTS)
def test_our_side_of_the_comparison_takes_a_step(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SIDE", 64)
    monkeypatch.setitem(peers.LATENTS, recipe, 17)
    objective, loss = peers.ours(recipe)
    assert math.isfinite(peers.step(objective, loss)())
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in objective.parameters())


def test_the_oracle_notices_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    equal, other = torch.tensor([3.0, 100.0]), torch.tensor([3.0, 100.0 * (1 + 1e-5)])
    assert oracle.difference(equal, equal) == 0
    oracle.report({"class loss": oracle.difference(other, equal), "pairs": 0.0})
    first, second = capsys.readouterr().out.splitlines()
    assert "DIFFERS" in first and "DIFFERS" not in second
