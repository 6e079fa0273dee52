"""Laws of the model around the decoder: what it accepts, similarity, class texts, padding, captions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import MODEL, model
from torch.nn import functional as F

from schemas.jobs import BackboneConfig, ModelConfig, TextConfig
from schemas.tasks import TASKS
from xdecoder.inference import postprocess
from xdecoder.inference.generate import greedy
from xdecoder.model.layers import sine_positions
from xdecoder.model.xdecoder import MAX_SCALE, ClassTexts, XDecoder, columns
from xdecoder.prompts import END, START, tokenize


@pytest.fixture(scope="module")
def tiny() -> XDecoder:
    return model().requires_grad_(False)


def test_pictures_must_fit_the_stride(tiny: XDecoder) -> None:
    with pytest.raises(ValueError, match=r"\(40, 64\).*multiples of 16"):
        tiny.encode(torch.zeros(1, 3, 40, 64), torch.zeros(1, 40, 64, dtype=torch.bool))


def test_an_unknown_backbone_is_named_with_its_neighbours() -> None:
    with pytest.raises(ValueError, match="'resnet_none' is no timm model; near.*resnet"):
        XDecoder(MODEL.model_copy(update={"backbone": BackboneConfig(name="resnet_none")}))


def test_masks_have_the_stride_of_the_finest_map(tiny: XDecoder) -> None:
    pixels = tiny.encode(torch.rand(2, 3, 32, 64), torch.zeros(2, 32, 64, dtype=torch.bool))
    images = torch.tensor([1, 0, 1])
    tasks = tiny.text(tiny.task_ids).sentence[:3]
    prediction = tiny.ask(pixels, "segmentation", images, tasks).final
    masks = tiny.masks(prediction, pixels, images)
    assert masks.shape == (3, MODEL.latents, 16, 32)
    plain = (prediction.mask_embed[0, 3] @ pixels.mask_features[1].flatten(1)).view(16, 32)
    torch.testing.assert_close(masks[0, 3], plain)
    assert [level.memory.shape[1] for level in pixels.levels] == [2 * 4, 4 * 8, 8 * 16]  # coarsest first


def test_similarity_is_the_scaled_cosine_and_its_scale_is_bounded(tiny: XDecoder) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 32)), rng.normal(size=(5, 32))
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b)]
    logits = tiny.similarity(torch.from_numpy(a).float(), torch.from_numpy(b).float())
    np.testing.assert_allclose(logits.numpy(), unit[0] @ unit[1].T / 0.07, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        before, _ = tiny.log_scale.clone(), tiny.log_scale.fill_(50)
        assert tiny.scale() == MAX_SCALE
        tiny.log_scale.copy_(before)


def test_what_the_backbone_says_ignores_padding(tiny: XDecoder) -> None:
    """A pure colour repeated into the padding: the mean over the picture is that over its cells."""
    padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    padding[:, 32:] = True
    images = torch.rand(1, 3, 64, 64)
    pooled = tiny.encode(images, padding).pooled
    deep = tiny.backbone(images)[-1]
    torch.testing.assert_close(pooled, deep[:, :, :2].mean((2, 3)))


def test_positions_count_the_picture_and_not_its_padding() -> None:
    small = sine_positions(torch.zeros(1, 3, 5, dtype=torch.bool), 32)
    padding = torch.ones(1, 6, 8, dtype=torch.bool)
    padding[:, :3, :5] = False
    torch.testing.assert_close(sine_positions(padding, 32)[:, :3, :5], small)


def test_a_class_is_the_mean_of_its_synonyms_and_no_object_comes_last(tiny: XDecoder) -> None:
    texts = ClassTexts.of(["dog, hound", "grass-merged"], 20)
    classes = texts.embed(tiny.text(texts.ids).sentence)
    alone = F.normalize(tiny.encode_texts(["dog", "hound", "grass", "no object"]).sentence, dim=-1)
    expected = torch.stack((F.normalize(alone[:2].mean(0), dim=0), alone[2], alone[3]))
    torch.testing.assert_close(classes, expected)


def test_a_class_called_background_is_not_the_no_object_class(tiny: XDecoder) -> None:
    texts = ClassTexts.of(["nucleus", "background"], 20)
    nucleus, background, nothing = texts.embed(tiny.text(texts.ids).sentence)
    assert not torch.allclose(background, nothing)


@pytest.mark.parametrize("name", ["no object", "hole, No-Object"])
def test_a_class_cannot_be_called_as_the_no_object_class_is(name: str) -> None:
    with pytest.raises(ValueError, match="rename"):
        ClassTexts.of(["dog", name], 20)


def test_the_words_for_no_object_are_reserved_however_they_are_written() -> None:
    with pytest.raises(ValueError, match="rename"):
        ClassTexts.of(["background"], 20, no_object="Background")


def test_a_greedy_caption_is_what_teacher_forcing_would_say(tiny: XDecoder) -> None:
    """The caption fed back in predicts itself: no slot is off by one, no later word is seen."""
    pixels = tiny.encode(torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.bool))
    images, task = torch.tensor([0, 1]), tiny.text(tiny.task_ids).sentence[[TASKS.index("captioning")] * 2]
    said: list[torch.Tensor] = []
    project = tiny.caption_embed.register_forward_hook(
        lambda _, __, out: said.append(tiny.text.token_logits(out).argmax(-1))
    )
    greedy(tiny, pixels, images, task, 6)
    project.remove()
    tokens = torch.stack(said, 1)
    assert tokens.shape == (2, 6), "as many words as asked for, where no caption ends"
    ids = torch.cat((torch.full((2, 1), START), tokens, torch.full((2, 1), END)), 1)
    slots = tiny.ask(pixels, "captioning", images, task, tiny.text(ids)).final.text
    assert slots is not None
    assert torch.equal(tiny.caption_logits(slots[:, :6]).argmax(-1), tokens)


def test_a_caption_never_outgrows_the_context(tiny: XDecoder) -> None:
    pixels = tiny.encode(torch.rand(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool))
    task = tiny.text(tiny.task_ids).sentence[:1]
    (caption,) = greedy(tiny, pixels, torch.tensor([0]), task, 1000)
    assert tokenize([caption], 1000).shape[1] <= MODEL.text.context + 1


# ------------------------------------------------------------------------------- settings of the recipes


def test_a_closed_classifier_is_a_linear_layer_and_its_columns_can_be_chosen() -> None:
    of = model(classes=5).requires_grad_(False)
    known = ["a", "b", "c", "d", "e"]
    queries = torch.rand(2, 3, MODEL.width)
    logits = of.class_logits(of.decoder.class_embed(queries), columns(known, ["d", "b"]))
    weight, bias = of.decoder.class_embed.weight, of.decoder.class_embed.bias
    torch.testing.assert_close(logits, queries @ weight[[3, 1, 5]].T + bias[[3, 1, 5]])
    with pytest.raises(ValueError, match=r"closed.*does not know \['f'\]"):
        columns(known, ["a", "f"])


def test_a_model_that_knows_no_words_has_no_parts_for_them() -> None:
    of = model(classes=5, task_tokens=False, text=None).requires_grad_(False)
    whole = model(classes=5, task_tokens=False)
    assert sum(p.numel() for p in of.parameters()) < sum(p.numel() for p in whole.parameters()) - 49408 * 32
    assert not any("text" in name or "caption" in name for name, _ in of.named_parameters())
    pixels = of.encode(torch.rand(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool))
    tasks = of.text(of.task_ids).sentence[:1]
    final = of.ask(pixels, "segmentation", torch.tensor([0]), tasks).final
    assert of.class_logits(final.semantic, torch.arange(6)).shape == (1, MODEL.latents, 6)
    with pytest.raises(ValueError, match="model.text is null"):
        of.encode_texts(["a dog"])


def test_class_names_may_be_told_in_a_width_of_their_own() -> None:
    text = TextConfig(width=48, layers=1, heads=2, context=20)
    of = model(task_tokens=False, text=text).requires_grad_(False)
    pixels = of.encode(torch.rand(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool))
    texts = ClassTexts.of(["dog", "cat"], 20)
    sentences = of.text(texts.ids).sentence
    final = of.ask(pixels, "segmentation", torch.tensor([0]), sentences[:1]).final
    assert sentences.shape[1] == 48
    assert of.class_logits(final.semantic, texts.embed(sentences)).shape == (1, MODEL.latents, 3)


def test_plain_attention_looks_at_the_coarsest_map_as_a_whole() -> None:
    """MaskFormer: what the finer levels hold, and where the masks lie, changes no query."""
    changes = {"masked_attention": False, "decoder_levels": 1, "task_tokens": False, "mask_pooling": False}
    of = model(**changes).requires_grad_(False)
    pixels = of.encode(torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    tasks, rows = of.text(of.task_ids).sentence[:1], torch.tensor([0])
    masks = [replace(level, mask_features=-level.mask_features) for level in pixels.levels]
    blind = replace(pixels, levels=(masks[0], *(replace(m, memory=0 * m.memory) for m in masks[1:])))
    one, two = (of.ask(p, "segmentation", rows, tasks).final.semantic for p in (pixels, blind))
    assert torch.equal(one, two)
    first = replace(pixels, levels=(replace(masks[0], memory=0 * masks[0].memory), *masks[1:]))
    assert not torch.allclose(one, of.ask(first, "segmentation", rows, tasks).final.semantic, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text": None}, "text: null needs classes"),
        ({"text": None, "classes": 3}, "task_tokens needs a text encoder"),
        ({"text": TextConfig(width=64)}, "task_tokens needs a text encoder of the model's width"),
        ({"output": "latents", "classes": 3}, "needs classes = latents, not 3 and 100"),
        ({"task_tokens": False, "text": TextConfig(width=65)}, "width 65 cannot be divided by text.heads 8"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModelConfig(**changes)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- per-pixel classification


def test_pixels_are_classified_by_their_own_features() -> None:
    of = model(output="pixels", classes=5, decoder_layers=0).requires_grad_(False)
    pixels = of.encode(torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.bool))
    rows, tasks = torch.tensor([1, 0]), of.text(of.task_ids).sentence[:2]
    final = of.ask(pixels, "segmentation", rows, tasks).final
    logits = of.pixel_logits(final, pixels, rows, torch.arange(6))
    head = of.decoder.class_embed
    expected = F.conv2d(pixels.mask_features[rows], head.weight[:5, :, None, None], head.bias[:5])
    torch.testing.assert_close(logits, expected)


def test_the_mask_of_a_latent_may_be_the_logit_of_its_class() -> None:
    of = model(output="latents", classes=MODEL.latents).requires_grad_(False)
    pixels = of.encode(torch.rand(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool))
    rows, tasks = torch.tensor([0]), of.text(of.task_ids).sentence[:1]
    final = of.ask(pixels, "segmentation", rows, tasks).final
    chosen = torch.tensor([4, 2, MODEL.latents])
    logits = of.pixel_logits(final, pixels, rows, chosen)
    torch.testing.assert_close(logits, of.masks(final, pixels, rows)[:, [4, 2]])
    probs, masks = of.pairs(final, pixels, rows, chosen)
    assert torch.equal(probs[0], torch.eye(2, 3))
    torch.testing.assert_close(masks, logits.log_softmax(1))


def test_the_class_of_a_pixel_is_that_of_its_largest_logit() -> None:
    """Also through the rule of semantic inference, and where logits are large enough to saturate."""
    for size in (1.0, 100.0):
        of = model(output="pixels", classes=5).requires_grad_(False)
        with torch.no_grad():
            of.decoder.class_embed.weight.mul_(size)
        pixels = of.encode(torch.rand(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool))
        rows, tasks = torch.tensor([0]), of.text(of.task_ids).sentence[:1]
        final = of.ask(pixels, "segmentation", rows, tasks).final
        probs, masks = of.pairs(final, pixels, rows, torch.arange(6))
        frame = postprocess.Frame(padded=(32, 32), valid=(32, 32), original=(32, 32))
        logits = of.pixel_logits(final, pixels, rows, torch.arange(6))
        large = F.interpolate(logits, size=(32, 32), mode="bilinear")
        assert (postprocess.semantic(probs[0], masks[0], frame) == large[0].argmax(0).numpy()).all()
