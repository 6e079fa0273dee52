"""Laws of sizes counted without making the model: the same as of the model that is made."""

import pytest
import torch
from test_recipes import recipe
from tiny import MODEL, model, train_config
from torch.utils.flop_counter import FlopCounterMode

from schemas.jobs import ModelConfig, TextConfig
from xdecoder.model.size import _kept_bytes, lines, measure


def test_parameters_and_multiply_adds_are_those_of_the_model_itself() -> None:
    size, of = measure(MODEL, train_config()), model()
    assert size.total == sum(p.numel() for p in of.parameters()) == size.trained
    assert size.parameters["text"] == sum(p.numel() for p in of.text.parameters())
    with FlopCounterMode(display=False) as counter:
        _kept_bytes(of, size.side)
    # attention is one operator here and two products there; both are counted
    assert size.multiply_adds == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


def test_what_segments_is_what_its_answers_come_from() -> None:
    of, size = model(), measure(MODEL, train_config())
    words = ("text.", "query_text", "caption_embed", "pooled_embed", "decoder.caption_positions")
    idle = sum(p.numel() for n, p in of.named_parameters() if n.startswith(words))
    assert size.segmenting == size.total - idle < size.total
    assert size.untold == sum(p.numel() for p in model(task_tokens=False).parameters())


def test_memory_is_estimated_from_above_and_not_far() -> None:
    real = _kept_bytes(model(), 64)
    with torch.device("meta"):
        from xdecoder.model.xdecoder import XDecoder

        counted = _kept_bytes(XDecoder(MODEL), 64)
    assert real <= counted <= 2 * real


def test_memory_of_a_gpu_is_that_of_its_share_of_both_streams() -> None:
    both = measure(MODEL, train_config())  # 4 and 4 pictures of 32 pixels
    masks = measure(MODEL, train_config(tasks=("panoptic",)))
    assert both.activations_bytes == 2 * masks.activations_bytes > 0
    assert measure(MODEL, train_config(num_workers=2)).activations_bytes == masks.activations_bytes


def test_frozen_weights_have_no_gradient_and_no_moments() -> None:
    assert MODEL.text is not None
    frozen = MODEL.model_copy(update={"text": MODEL.text.model_copy(update={"frozen": True})})
    plain, less = measure(MODEL, train_config()), measure(frozen, train_config())
    assert plain.total == less.total
    assert plain.weights_bytes - less.weights_bytes == 12 * (less.total - less.trained) > 0


def test_nothing_is_fetched() -> None:
    """A backbone's and CLIP's weights are named, and would have to come from elsewhere."""
    text = TextConfig(layers=1, heads=2, clip="ViT-B-16/nobody")
    backbone = MODEL.backbone.model_copy(update={"pretrained": True})
    size = measure(ModelConfig(**MODEL.model_dump() | {"text": text, "backbone": backbone}), train_config())
    assert lines(size)[0].startswith(f"# parameters: {size.total / 1e6:.2f} M (")


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("oneformer_swin_l", 436),  # OneFormer, ADE20K at 640 pixels (1.13)
        ("maskformer_swin_l", 375),  # MaskFormer, arXiv 2107.06278, Table 1: ADE20K at 640 pixels
        ("per_pixel_plus", 53),  # not published; MaskFormer's own with the same parts, Table 1: R50 at 512
    ],
)
def test_multiply_adds_are_near_the_papers(name: str, published: float) -> None:
    """Backbones' window padding and what a counter leaves out differ a little."""
    job = recipe(name)
    config = job.train.model_copy(update={"tasks": ("semantic",)})
    assert measure(job.model, config).multiply_adds / 1e9 == pytest.approx(published, rel=0.06)
