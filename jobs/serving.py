"""How MLflow loads and asks a logged model (`pyfunc`). Imported from the code that travels with the model.

A request is a row: `image` (a path, or the bytes of a JPEG or PNG in base64), `task`, and where the task
needs them `text` (a phrase, a question, a text to rank by) and `classes` (names, as in `parse_classes`). The
answer is JSON.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from jobs.predict import Request, predict
from xdecoder.inference.predictor import Picture, Predictor, read_picture


class Served:
    """A predictor behind MLflow's interface."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """A JSON document for each row. Raises `ValueError` naming what is wrong with a row."""
        return [self._answer(row) for row in model_input.to_dict("records")]

    def _answer(self, row: dict[str, Any]) -> str:
        request = Request(
            images=(_image(row["image"]),),
            task=row["task"],
            texts=(row["text"],) if row.get("text") else (),
            classes=row.get("classes") or "",
        )
        (answer,) = predict(self.predictor, request)
        return json.dumps(answer.document)


def _load_pyfunc(path: str) -> Served:
    """MLflow's entry point: `path` is the folder of the exported model."""
    return Served(Predictor.load(path))


def _image(text: str) -> Picture:
    if len(text) < 4096 and Path(text).is_file():
        return text
    try:
        return read_picture(Image.open(io.BytesIO(base64.b64decode(text, validate=True))))
    except (ValueError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image is neither a file here nor a JPEG or PNG in base64: {text[:60]!r} ({error})"
        ) from error
