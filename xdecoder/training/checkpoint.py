"""Training state and finished models on disk.

A checkpoint holds everything that changes during training, so that going on is the same as never having stopped. A
model is what prediction needs: weights as safetensors, and one JSON document. Neither needs a pickle to be executed.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file

from schemas.jobs import ModelConfig
from schemas.taxonomy import Taxonomy
from xdecoder.model.xdecoder import XDecoder
from xdecoder.prompts import Vocabulary
from xdecoder.training.trainer import Trainer

STATE, WEIGHTS, CARD = "rank{rank}.pt", "model.safetensors", "model.json"


class ModelCard(BaseModel):
    """`model.json`: the architecture, the words it was trained with, the sizes it saw in training."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int = 1
    model: ModelConfig
    taxonomy: Taxonomy
    answers: tuple[str, ...]
    image_size: int
    image_text_size: int

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(taxonomy=self.taxonomy, answers=self.answers)


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
    folder.mkdir(parents=True, exist_ok=True)
    card = ModelCard(
        model=trainer.model.config,
        taxonomy=trainer.vocabulary.taxonomy,
        answers=trainer.vocabulary.answers,
        image_size=trainer.config.augment.image_size,
        image_text_size=trainer.config.augment.image_text_size,
    )
    save_file({k: v.contiguous() for k, v in trainer.model.state_dict().items()}, folder / WEIGHTS)
    (folder / CARD).write_text(card.model_dump_json(indent=1), encoding="utf-8")


def load_model(folder: Path, device: str = "cpu") -> tuple[XDecoder, ModelCard]:
    """A finished model, ready to predict. Raises `ValueError` where the folder holds none."""
    for name in (CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no model: {name} is missing")
    try:
        card = ModelCard.model_validate_json((folder / CARD).read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ValueError(f"{folder / CARD}: {error}") from None
    model = XDecoder(card.model.model_copy(update={"backbone": _untrained(card.model)})).to(device).eval()
    model.load_state_dict(load_file(folder / WEIGHTS, device=device))
    return model, card


def _untrained(config: ModelConfig) -> Any:
    return config.backbone.model_copy(update={"pretrained": False})  # its weights come from the file


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    loaded: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return loaded
