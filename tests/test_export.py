"""Laws of the model as a graph and in half precision: it says what the model says."""

import io
from typing import Any

import pytest
import torch
from tiny import COLOURS, model
from torch import Tensor

from xdecoder.inference.export import FixedClasses, export_segmentation
from xdecoder.model.xdecoder import XDecoder

SIZE = (32, 48)
CLASSES = ("a zebra, a striped horse", *COLOURS)


def batch(count: int) -> tuple[Tensor, Tensor]:
    padding = torch.zeros(count, *SIZE, dtype=torch.bool)
    padding[:, 20:] = True
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(count)), padding


CLOSED = {"text": None, "task_tokens": False, "classes": len(CLASSES)}


OPEN: tuple[dict[str, Any], ...] = (
    {},
    {"task_tokens": False, "mask_pooling": False},
    {"pixel_decoder": "deformable"},
    {"output": "pixels"},
    {"output": "latents", "latents": len(CLASSES), "classes": len(CLASSES)},
)


@pytest.mark.parametrize("changes", [*OPEN, CLOSED])
def test_the_exported_graph_says_what_the_model_says(changes: dict[str, Any]) -> None:
    of = model(**changes).requires_grad_(False)
    file = io.BytesIO()
    torch.export.save(export_segmentation(of, CLASSES, SIZE), file)
    file.seek(0)
    graph = torch.export.load(file).module()
    for count in (1, 3):
        for said, expected in zip(
            graph(*batch(count)), FixedClasses(of, CLASSES)(*batch(count)), strict=True
        ):
            assert said.shape[0] == count
            torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-5)


def test_a_closed_class_list_cannot_be_exchanged() -> None:
    with pytest.raises(ValueError, match="closed"):
        FixedClasses(model(**CLOSED), CLASSES[:2])


def test_a_graph_is_made_for_a_task_and_its_classes() -> None:
    of = model().requires_grad_(False)
    panoptic, semantic = FixedClasses(of, CLASSES), FixedClasses(of, CLASSES, "semantic")
    (probs, masks), (other, _) = panoptic(*batch(1)), semantic(*batch(1))
    assert probs.shape == (1, of.config.latents, len(CLASSES) + 1) and masks.shape[1] == of.config.latents
    assert not torch.allclose(probs, other)


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1)  # meanings are compared by their direction


def outputs(of: XDecoder, device: str, half: bool) -> dict[str, Tensor]:
    """Everything a request can tell, from one set of weights."""
    images, padding = (x.to(device) for x in batch(2))
    rows = torch.arange(2, device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
        text = of.encode_texts(["a red square", "is it left of the other one?"])
        tasks = of.text(of.task_ids).sentence[:2]
        pixels = of.encode(images, padding)
        found = {"text": unit(text.sentence), "pooled": unit(of.embed_pooled(pixels))}
        for pattern in ("segmentation", "referring", "captioning", "vqa"):
            asked = None if pattern == "segmentation" else text
            final = of.ask(pixels, pattern, rows, tasks, asked).final  # type: ignore[arg-type]
            found |= {
                f"{pattern} meaning": unit(final.semantic),
                f"{pattern} image": unit(final.image),
                f"{pattern} classes": of.similarity(final.semantic, text.sentence).softmax(-1),
                f"{pattern} masks": of.masks(final, pixels, rows).sigmoid(),
            }
            if final.text is not None:
                found[f"{pattern} words"] = unit(final.text)
    return {name: value.float().cpu() for name, value in found.items()}


def test_half_precision_on_the_processor_is_close() -> None:
    of = model().requires_grad_(False)
    whole, half = outputs(of, "cpu", False), outputs(of, "cpu", True)
    for name, value in whole.items():
        assert (half[name] - value).abs().max() < 2e-2, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_on_a_device_is_close() -> None:
    whole = outputs(model().requires_grad_(False), "cpu", False)
    of = model().requires_grad_(False).cuda()
    for half, most in ((False, 1e-3), (True, 2e-2)):
        for name, value in outputs(of, "cuda", half).items():
            assert (value - whole[name]).abs().max() < most, name
