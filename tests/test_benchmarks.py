"""Benchmarks run as written, small: a few pictures, a few steps, a few shards."""

import argparse
import hashlib
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TAXONOMY, endless, samples

from benchmarks import faults_training, loader, oracle, peers, scale
from benchmarks.zeroshot import HEADS, JOB, RECIPES, World, trial
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
    *general, alone = trial(job, world, seed=1)
    assert len(general) + 1 == len(HEADS)
    for seen, unseen, harmonic in (general[:3], general[3:]):  # as they are, and calibrated
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


@pytest.mark.parametrize("content", loader.CONTENTS)
def test_loaders_that_are_compared_deliver_the_same_pixels(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "DISTINCT", 4)
    (tmp_path / "files").mkdir()
    loader.write_files(tmp_path / "files")
    seen = {}
    for way in ("ours", "processes", "webdataset"):
        if way != "processes":
            loader.WAYS[way][0](tmp_path, 4)
        drawn = next(iter(loader.WAYS[way][1](tmp_path, content, 4, 1)))
        columns = drawn if way == "webdataset" else drawn[0]  # ours come with their position
        # of the companion only that it is there: ours holds indices in the place of colours
        assert len(columns) == (1 if content == "jpeg" else 2)
        seen[way] = sorted(hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest() for x in columns[0])
    assert seen["ours"] == seen["processes"] == seen["webdataset"]


def test_a_plan_is_checked_for_any_number_of_ranks() -> None:
    arguments = argparse.Namespace(shards=300, samples=20, ranks=64, share=2, rank=63)
    mixture = scale.sequence(arguments)
    scale.check_structure(mixture, windows=20)
    scale.check_ranks(mixture, argparse.Namespace(shards=300, samples=20, ranks=512, share=2))
    assert scale.plan(arguments)["peak_mb"] > 0
    near = [scale.mixing(window, shards=64, samples=10)[0] for window in (1, 8, 64)]
    assert near == sorted(near) and 0.9 < near[-1] < 1.1
    (order,) = mixture.orders
    whole = order._order
    order._order = lambda epoch, number: whole(epoch, number)[[0, *range(len(whole(epoch, number)) - 1)]]
    with pytest.raises(AssertionError, match="window"):
        scale.check_structure(mixture, windows=3)


def test_a_training_that_lost_or_doubled_anything_is_told_from_the_undisturbed_one() -> None:
    def training(**changes: Any) -> Any:
        steps = {step: {"loss": 1 / step, "epoch/segmentation": step / 6} for step in (1, 2, 3)}
        told = {"learned": steps, "tracked": Counter(list(steps)), "weights": b"w"}
        return SimpleNamespace(**(told | changes))

    whole = training()
    rounded = {s: m | {"loss": m["loss"] * (1 + 1e-6)} for s, m in whole.learned.items()}
    moved = {s: m | {"epoch/segmentation": s / 5} for s, m in whole.learned.items()}
    cases = [
        ({"learned": {s: whole.learned[s] for s in (1, 2)}}, "steps [3]"),
        ({"tracked": Counter((1, 2, 2, 3))}, "MLflow has 4 losses of 3 steps"),
        ({"tracked": Counter((1, 2, 2))}, "MLflow has 3 losses of 3 steps"),
        ({"learned": moved}, "epoch/segmentation of step 1: 0.2 instead of"),
    ]
    for exact in (True, False):
        assert faults_training.differences(training(), whole, exact=exact) == []
        for changes, said in cases:
            found = faults_training.differences(training(**changes), whole, exact=exact)
            assert any(said in line for line in found), (said, found)
    assert faults_training.differences(training(weights=b"v"), whole, exact=True) == ["the weights"]
    assert len(faults_training.differences(training(learned=rounded), whole, exact=True)) == 3
    assert faults_training.differences(training(learned=rounded), whole, exact=False) == []
