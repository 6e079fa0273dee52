"""Weights of the original X-Decoder -> a model of ours: `python -m jobs import`."""

from pathlib import Path
from typing import Any

from jobs.console import Outcome
from jobs.store import code_version
from schemas.taxonomy import shipped
from xdecoder.model import original
from xdecoder.model.files import CARD, ModelCard, save_model
from xdecoder.model.xdecoder import XDecoder

# What the released models were trained at (X-Decoder, 4.3).
IMAGE_SIZE, IMAGE_TEXT_SIZE = 1024, 224


def adopt(
    checkpoint: Path,
    folder: Path,
    *,
    heads: int | None = None,
    text_heads: int | None = None,
    registered_model: str | None = None,
    store: Path,
) -> Outcome:
    """Write the model's folder, which `Predictor.load` opens, and register it where a name is given.

    Raises `ValueError` where the file holds other weights, or the folder holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give another folder with --out")
    state = original.weights(original.read(checkpoint))
    config = original.model_config(state, heads=heads, text_heads=text_heads)
    model = XDecoder(config)
    original.load(model, state)
    card = ModelCard(
        model=config,
        taxonomy=shipped("coco"),
        answers=(),
        image_size=IMAGE_SIZE,
        image_text_size=IMAGE_TEXT_SIZE,
    )
    save_model(model, card, folder)
    facts: dict[str, Any] = {
        "kept in": str(folder),
        "parameters": sum(p.numel() for p in model.parameters()),
        "found": {  # no setting in the file says it: one that lacks its last layer looks like a smaller model
            "text layers": config.text.layers if config.text else 0,
            "decoder layers": config.decoder_layers,
            "encoder layers": config.encoder_layers,
            "latents": config.latents,
        },
    }
    facts["asks with"] = f"{len(config.prompts)} sentences a class; fewer (prompts in {CARD}) answer sooner"
    if skipped := original.left_out(state):
        facts["left out"] = skipped
    if registered_model is not None:
        from jobs.tracking import connect  # MLflow, which takes seconds

        tracker = connect(store)
        tags = {"source": checkpoint.name, "code_version": code_version()}
        params = {"model": config.model_dump(mode="json")}
        run = tracker.start(registered_model, f"import-{checkpoint.stem}", params, tags)
        with tracker.running(run):
            version = tracker.register(run, registered_model, folder, tags)
        facts |= {"model": version.model, "version": version.version}
    return Outcome(facts=facts)
