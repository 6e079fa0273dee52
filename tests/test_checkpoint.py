"""Laws of checkpoints: going on is the same as never having stopped, and a wrong one is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_trainer import fit, losses_of, trainer
from tiny import MODEL, VOCABULARY, model, train_config

from xdecoder.model.files import CARD, WEIGHTS, ModelCard, load_model, save_model
from xdecoder.training import checkpoint
from xdecoder.training.trainer import Trainer


def test_interrupted_equals_uninterrupted_to_the_last_bit(tmp_path: Path) -> None:
    whole = trainer()
    expected = losses_of(fit(whole, 5))

    first = trainer()
    head = losses_of(fit(first, 3))
    checkpoint.save(first, tmp_path)
    second = trainer(seed=0)
    torch.rand(17)  # what happens in between must not matter
    checkpoint.restore(second, tmp_path)
    assert second.step == 3 and second.positions == first.positions
    tail = losses_of(fit(second, 5))

    assert head + tail == expected
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_saving_does_not_change_the_training(tmp_path: Path) -> None:
    losses = []
    for saves in (False, True):
        of = trainer(tasks=("captioning",))
        fit(of, 1)
        if saves:
            checkpoint.save(of, tmp_path)
            checkpoint.export(of, tmp_path / "model")
        losses.append(losses_of(fit(of, 2)))
    assert losses[0] == losses[1]


def test_a_checkpoint_can_be_restored_on_more_ranks(tmp_path: Path) -> None:
    one = trainer(tasks=("captioning",))
    fit(one, 1)
    checkpoint.save(one, tmp_path)
    rank = Trainer(MODEL, train_config(tasks=("captioning",)), VOCABULARY, rank=1, world_size=2)
    random = torch.get_rng_state()
    checkpoint.restore(rank, tmp_path)
    assert rank.step == 1 and torch.equal(torch.get_rng_state(), random)
    for a, b in zip(one.model.parameters(), rank.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_first_rank_writes_the_weights(tmp_path: Path) -> None:
    rank = Trainer(MODEL, train_config(), VOCABULARY, rank=1, world_size=2)
    checkpoint.save(rank, tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name == "rank1.pt" and "model" not in torch.load(file, weights_only=True)


def test_a_missing_checkpoint_and_one_of_another_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no checkpoint at {tmp_path}"):
        checkpoint.restore(trainer(), tmp_path)
    checkpoint.save(trainer(), tmp_path)
    other = Trainer(MODEL.model_copy(update={"latents": 5}), train_config(), VOCABULARY)
    with pytest.raises(ValueError, match="(?s)of another model.*size mismatch"):
        checkpoint.restore(other, tmp_path)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (np.fromfile, ("/etc/hostname",))


def test_a_checkpoint_cannot_execute_anything(tmp_path: Path) -> None:
    torch.save({"step": Hostile()}, tmp_path / "rank0.pt")
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported"):
        checkpoint.restore(trainer(), tmp_path)


def card() -> ModelCard:
    return ModelCard(
        model=MODEL,
        taxonomy=VOCABULARY.taxonomy,
        answers=VOCABULARY.answers,
        image_size=32,
        image_text_size=32,
    )


def test_a_model_comes_back_from_its_folder(tmp_path: Path) -> None:
    of = model()
    save_model(of, card(), tmp_path)
    loaded, said = load_model(tmp_path)
    assert said == card() and said.vocabulary == VOCABULARY and not loaded.training
    for (name, a), b in zip(of.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_export_writes_what_was_trained(tmp_path: Path) -> None:
    of = trainer(tasks=("captioning",))
    fit(of, 1)
    checkpoint.export(of, tmp_path)
    loaded, said = load_model(tmp_path)
    assert (said.image_size, said.image_text_size, said.answers) == (32, 32, VOCABULARY.answers)
    for a, b in zip(of.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [CARD, WEIGHTS])
def test_a_folder_without_a_model_is_named(tmp_path: Path, name: str) -> None:
    save_model(model(), card(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{tmp_path} holds no model: {name} is missing"):
        load_model(tmp_path)


def test_a_card_with_unknown_fields_is_refused(tmp_path: Path) -> None:
    save_model(model(), card(), tmp_path)
    path = tmp_path / CARD
    path.write_text(path.read_text().replace('"format": 1', '"format": 1, "colour": 2'))
    with pytest.raises(ValueError, match=r"(?s)model\.json.*colour"):
        load_model(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_model(model(latents=5), card(), tmp_path)
    with pytest.raises(ValueError, match="another model"):
        load_model(tmp_path)
