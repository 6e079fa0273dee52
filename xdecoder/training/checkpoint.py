"""Training state on disk: everything that changes, so that going on is the same as never having stopped."""

from pathlib import Path
from typing import Any

import torch

from xdecoder.model.files import ModelCard, save_model
from xdecoder.training.trainer import Trainer

STATE = "rank{rank}.pt"


def save(trainer: Trainer, folder: Path) -> None:
    """Write this rank's part of a checkpoint; rank 0's also holds what all ranks share."""
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {
        "step": trainer.step,
        "positions": dict(trainer.positions),
        "random": torch.get_rng_state(),
    }
    if trainer.rank == 0:
        state |= {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    torch.save(state, folder / STATE.format(rank=trainer.rank))


def restore(trainer: Trainer, folder: Path) -> None:
    """Go on from a checkpoint; a rank that the checkpoint does not know keeps its own random state.

    Raises `ValueError` where there is no checkpoint or it is of another model.
    """
    shared = _load(folder / STATE.format(rank=0))
    try:
        trainer.model.load_state_dict(shared["model"])
    except RuntimeError as error:
        raise ValueError(f"{folder}: the checkpoint is of another model: {error}") from None
    trainer.optimizer.load_state_dict(shared["optimizer"])
    trainer.step, trainer.positions = shared["step"], shared["positions"]
    own = folder / STATE.format(rank=trainer.rank)
    if own.is_file():
        torch.set_rng_state(_load(own)["random"])


def export(trainer: Trainer, folder: Path) -> None:
    """Write the model for prediction."""
    save_model(trainer.model, card(trainer), folder)


def card(trainer: Trainer) -> ModelCard:
    """What prediction must know beside the weights."""
    return ModelCard(
        model=trainer.model.config,
        taxonomy=trainer.vocabulary.taxonomy,
        answers=trainer.vocabulary.answers,
        image_size=trainer.config.augment.image_size,
        image_text_size=trainer.config.augment.image_text_size,
    )


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    loaded: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return loaded
