"""Laws of the model on a device: nothing is left behind on the processor, in any request, loss or answer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from elsewhere import elsewhere
from test_export import outputs
from test_predictor import CARD
from tiny import MODEL, VOCABULARY, endless, model, samples, train_config

from schemas.jobs import LossConfig, ModelConfig
from xdecoder.inference.predictor import Predictor
from xdecoder.training.batch import to_device
from xdecoder.training.trainer import Trainer

PLAIN = {"task_tokens": False, "mask_pooling": False}
SEMANTIC: dict[str, Any] = {"tasks": ("semantic",), "task_sampling": (1, 0, 0)}
TRAININGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all tasks": ({}, {}),
    "deformable": ({"pixel_decoder": "deformable"}, {}),
    "learned no-object": ({**PLAIN, "no_object": None}, {**SEMANTIC, "loss": LossConfig(points=64)}),
    "every pixel": (PLAIN, {**SEMANTIC, "loss": LossConfig(points=0, mask_bce=0, mask_focal=20)}),
    "per pixel": (
        {**PLAIN, "output": "pixels", "decoder_layers": 0},
        {**SEMANTIC, "loss": LossConfig(region_ce=0)},
    ),
}


def test_operands_of_two_devices_are_found() -> None:
    with elsewhere() as device:
        there = torch.ones(3, device=device)
        assert (there + 1).device == torch.device(device)
        assert torch.equal(
            (there * torch.tensor([1.0, 2, 3], device=device)).cpu(), torch.tensor([1.0, 2, 3])
        )
        with pytest.raises(RuntimeError, match=r"\(3,\)"):
            there + torch.ones(3)


def test_every_request_is_asked_and_answered_there() -> None:
    here = outputs(model().requires_grad_(False), "cpu", False)
    with elsewhere() as device:
        there = outputs(model().requires_grad_(False).to(device), "cuda", False)
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", TRAININGS)
def test_every_loss_is_computed_there(kind: str) -> None:
    changes, settings = TRAININGS[kind]
    config, train = MODEL.model_copy(update=changes), train_config(**settings)

    def terms(device: str) -> dict[str, float]:
        of = Trainer(ModelConfig.model_validate(config.model_dump()), train, VOCABULARY, device=device)
        micro = tuple(next(endless(of.make_batch(s), samples()))[0] for s in of.streams)
        torch.manual_seed(1)
        return {name: value.item() for name, value in of.objective(to_device(micro, device)).items()}

    with elsewhere() as device:
        there = terms(device)
    assert there == pytest.approx(terms("cpu"), rel=1e-5)


PICTURES = [sample.image for sample in samples(3)]
ANSWERS: dict[str, Callable[[Predictor], list[Any]]] = {
    "panoptic": lambda p: [found.map.labels for found in p.panoptic(PICTURES)],
    "semantic": lambda p: [found.labels for found in p.semantic(PICTURES, classes=["a zebra", "sky"])],
    "instance": lambda p: [found.instances.scores for found in p.instance(PICTURES)],
    "refer": lambda p: [p.refer(PICTURES[0], ["the red square", "sky"]).scores],
    "retrieve": lambda p: [p.retrieve(PICTURES, ["a red square", "grass"]).scores],
    "caption": lambda p: [list(found.text.encode()) for found in p.caption(PICTURES)],
    "answer": lambda p: [found.score for found in p.answer(PICTURES[0], ["what is it?"])],
    "find": lambda p: [p.find(PICTURES, "the red square").scores],
    "describe": lambda p: [
        list(found.text.encode()) for found in p.describe(PICTURES[0], [PICTURES[0][..., 0] > 128])
    ],
}


@pytest.mark.parametrize("asked", ANSWERS)
def test_every_answer_is_found_there(asked: str) -> None:
    here = ANSWERS[asked](Predictor(model(), CARD, batch=2))
    with elsewhere() as device:
        there = ANSWERS[asked](Predictor(model().to(device), CARD, batch=2))
    for one, other in zip(there, here, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", ANSWERS)
def test_every_answer_is_found_in_half_precision(asked: str) -> None:
    """What is kept of texts there is as good in full precision."""
    half, whole = Predictor(model(), CARD, batch=2), Predictor(model(), CARD, batch=2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = ANSWERS[asked](half)
    expected = ANSWERS[asked](whole)
    assert len(rough) == len(expected)
    for one, other in zip(ANSWERS[asked](half), expected, strict=True):
        np.testing.assert_array_equal(one, other)
