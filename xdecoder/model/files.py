"""A finished model on disk: weights as safetensors, and one JSON document. Nothing in it can execute."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from schemas.jobs import ModelConfig
from schemas.taxonomy import Taxonomy
from xdecoder.model.xdecoder import XDecoder
from xdecoder.prompts import Vocabulary

WEIGHTS, CARD = "model.safetensors", "model.json"


class ModelCard(BaseModel):
    """`model.json`: the architecture, the words it was trained with, the sizes it saw in training
    (pixels).
    """

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


def save_model(
    model: XDecoder, card: ModelCard, folder: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write both files; `weights` are written in the place of the model's own."""
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if weights is None else weights
    save_file({k: v.contiguous() for k, v in state.items()}, folder / WEIGHTS)
    (folder / CARD).write_text(card.model_dump_json(indent=1), encoding="utf-8")


def unfetched(config: ModelConfig) -> ModelConfig:
    """The same architecture without weights from elsewhere: they come from a file, or are not needed."""
    changes: dict[str, object] = {"backbone": config.backbone.model_copy(update={"pretrained": False})}
    if config.text:
        changes["text"] = config.text.model_copy(update={"clip": ""})
    return config.model_copy(update=changes)


def load_model(folder: Path, device: str = "cpu") -> tuple[XDecoder, ModelCard]:
    """A finished model, ready to predict. Raises `ValueError` where the folder holds none."""
    for name in (CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no model: {name} is missing")
    try:
        card = ModelCard.model_validate_json((folder / CARD).read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ValueError(f"{folder / CARD}: {error}") from None
    model = XDecoder(unfetched(card.model)).to(device).eval()
    try:
        model.load_state_dict(load_file(folder / WEIGHTS, device=device))
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: damaged ({error}); fetch or export it again") from None
    except RuntimeError as error:
        raise ValueError(
            f"{folder / WEIGHTS}: of another model than {CARD}, or of an earlier release: {error}"
        ) from None
    return model, card
