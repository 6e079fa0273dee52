"""Laws of the decoder: who hears whom, requests that do not disturb one another, masks that never blind.

A query's neighbours are found by experiment: one query is changed before a layer, and who is different behind
it has heard it.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import MODEL, model
from torch import Tensor, nn

from schemas.tasks import TASKS
from xdecoder.model.decoder import PATTERNS, Kind, Outputs, PatternName, Pixels
from xdecoder.model.text import TextFeatures
from xdecoder.model.xdecoder import XDecoder

O = MODEL.latents  # noqa: E741
PHRASE = "a red square"  # five tokens with start and end

# Who is heard by whom, as X-Decoder's 2.1 draws it, with the task token among the latents.
HEARS: dict[PatternName, dict[Kind, set[Kind]]] = {
    "segmentation": {"latent": {"latent", "task"}, "image": {"task"}, "task": {"latent"}},
    "referring": {
        "latent": {"latent", "task", "text"},
        "image": {"task"},
        "task": {"latent"},
        "text": {"latent", "task", "text"},
    },
    "captioning": {
        "latent": {"latent", "task"},
        "image": {"task"},
        "task": {"latent"},
        "text": {"latent", "image", "task", "text"},
    },
    "vqa": {
        "latent": {"latent", "task"},
        "image": {"task"},
        "task": {"latent"},
        "text": {"latent", "image", "task", "text"},
    },
}


@pytest.fixture(scope="module")
def deep() -> XDecoder:
    return model(decoder_layers=3).requires_grad_(False)


@pytest.fixture(scope="module")
def shallow() -> XDecoder:
    return model(decoder_layers=1).requires_grad_(False)


def encode(of: XDecoder, count: int = 1, seed: int = 0) -> Pixels:
    images = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return of.encode(images, torch.zeros(count, 64, 64, dtype=torch.bool))


def sentences(of: XDecoder) -> Tensor:
    return of.text(of.task_ids).sentence


def ask(
    of: XDecoder,
    pattern: PatternName,
    text: str | None,
    *,
    pixels: Pixels | None = None,
    images: tuple[int, ...] = (0,),
    tasks: tuple[int, ...] = (2,),
) -> Outputs:
    words = None if text is None else of.encode_texts([text] * len(images))
    pixels = pixels or encode(of)
    return of.ask(pixels, pattern, torch.tensor(images), sentences(of)[list(tasks)], words)


def words_of(pattern: PatternName) -> str | None:
    return None if pattern == "segmentation" else PHRASE


def final_queries(of: XDecoder, run: Callable[[], Outputs]) -> Tensor:
    """float[R, S, D]: all queries behind the last layer, normalised."""
    seen: list[Tensor] = []
    hook = of.decoder.norm.register_forward_hook(lambda _, __, out: seen.append(out))
    run()
    hook.remove()
    return seen[-1]


def who_hears(of: XDecoder, pixels: Pixels, pattern: PatternName, query: int) -> list[int]:
    """The queries that differ behind the first layer where `query` differs before it."""

    def disturb(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0].clone()
        x[:, query] += 1
        return (x, *inputs[1:])

    def run() -> Outputs:
        return ask(of, pattern, words_of(pattern), pixels=pixels)

    before = final_queries(of, run)
    hook = of.decoder.layers[0].register_forward_pre_hook(disturb)
    after = final_queries(of, run)
    hook.remove()
    return (before != after).any(-1)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_every_query_hears_exactly_whom_the_table_names(shallow: XDecoder, pattern: PatternName) -> None:
    kinds: list[Kind] = ["latent"] * O + ["image", "task"] + ["text"] * (5 if words_of(pattern) else 0)
    causal, pixels = pattern == "captioning", encode(shallow)
    for query, said in enumerate(kinds):
        expected = [
            other
            for other, hearer in enumerate(kinds)
            if other == query
            or (
                said in HEARS[pattern][hearer] and not (causal and said == hearer == "text" and other < query)
            )
        ]
        assert who_hears(shallow, pixels, pattern, query) == expected, (pattern, said, query)


def test_a_caption_changes_no_latent_and_no_image_query(deep: XDecoder) -> None:
    for pattern in ("captioning", "vqa"):
        one, two = ask(deep, pattern, PHRASE), ask(deep, pattern, "something else, and far longer")
        silent = ask(deep, "segmentation", None)
        for a, b, c in zip(one.predictions, two.predictions, silent.predictions, strict=True):
            for field in ("semantic", "image", "mask_embed"):
                torch.testing.assert_close(getattr(a, field), getattr(b, field))
                torch.testing.assert_close(getattr(a, field), getattr(c, field))


def test_a_caption_slot_does_not_depend_on_later_words(deep: XDecoder) -> None:
    whole = ask(deep, "captioning", "a red square on grass").final.text
    other = ask(deep, "captioning", "a red square in sky").final.text
    assert whole is not None and other is not None
    torch.testing.assert_close(whole[:, :4], other[:, :4])
    assert not torch.allclose(whole[:, 4], other[:, 4])


def test_a_question_is_read_as_a_whole(deep: XDecoder) -> None:
    whole, other = (ask(deep, "vqa", f"is it {word} there").final.text for word in ("red", "big"))
    assert whole is not None and other is not None
    assert not torch.allclose(whole[:, 1], other[:, 1], atol=1e-6)


def test_a_phrase_changes_the_latents_but_not_the_image_query(shallow: XDecoder) -> None:
    one, two = (ask(shallow, "referring", text).final for text in (PHRASE, "the blue one"))
    assert not torch.allclose(one.semantic, two.semantic)
    assert not torch.allclose(one.mask_embed, two.mask_embed)
    before, after = (
        final_queries(shallow, lambda text=text: ask(shallow, "referring", text))[:, O]  # type: ignore[misc]
        for text in (PHRASE, "the blue one")
    )
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_requests_of_one_call_equal_separate_calls(deep: XDecoder, pattern: PatternName) -> None:
    pixels, text = encode(deep, 2), words_of(pattern)
    images, tasks = (0, 1, 0), (0, 1, 2)
    together = ask(deep, pattern, text, pixels=pixels, images=images, tasks=tasks)
    for row, (image, task) in enumerate(zip(images, tasks, strict=True)):
        alone = ask(deep, pattern, text, pixels=pixels, images=(image,), tasks=(task,))
        _same(together, alone, row)


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_a_batch_of_two_equals_two_of_one(deep: XDecoder, pattern: PatternName) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    inside = torch.zeros(2, 64, 64, dtype=torch.bool)
    inside[:, 50:] = True  # some padding, alike in both
    pixels, text = deep.encode(images, inside), words_of(pattern)
    together = ask(deep, pattern, text, pixels=pixels, images=(0, 1), tasks=(0, 1))
    for row in (0, 1):
        single = deep.encode(images[row : row + 1], inside[:1])
        alone = ask(deep, pattern, text, pixels=single, tasks=(row,))
        _same(together, alone, row)
        torch.testing.assert_close(pixels.pooled[row], single.pooled[0], atol=1e-5, rtol=1e-4)


def test_texts_of_different_length_do_not_disturb_one_another(deep: XDecoder) -> None:
    texts, pixels = ["dog", "a red square on grass"], encode(deep)
    tasks = sentences(deep)[[2, 2]]
    for pattern in ("referring", "captioning", "vqa"):
        together = deep.ask(pixels, pattern, torch.tensor([0, 0]), tasks, deep.encode_texts(texts)).final
        for row, text in enumerate(texts):
            alone = ask(deep, pattern, text, pixels=pixels).final
            torch.testing.assert_close(together.semantic[row], alone.semantic[0], atol=1e-5, rtol=1e-4)
            assert together.text is not None and alone.text is not None
            length = alone.text.shape[1]
            torch.testing.assert_close(together.text[row, :length], alone.text[0], atol=1e-5, rtol=1e-4)


def test_a_mask_that_blocks_everything_blocks_nothing() -> None:
    deep = model(decoder_layers=3, mask_pooling=False).requires_grad_(False)
    pixels = encode(deep)

    def with_masks(sign: float) -> Pixels:
        levels = [
            replace(level, mask_features=sign * torch.ones_like(level.mask_features))
            for level in pixels.levels
        ]
        return replace(pixels, levels=tuple(levels))

    hook = deep.decoder.mask_embed.register_forward_hook(lambda _, __, out: torch.ones_like(out))
    blocked, free = (ask(deep, "segmentation", None, pixels=with_masks(sign)) for sign in (-1.0, 1.0))
    hook.remove()
    assert torch.isfinite(blocked.final.semantic).all()
    assert torch.equal(blocked.final.semantic, free.final.semantic)


def test_latents_look_inside_their_mask_and_all_others_everywhere(deep: XDecoder) -> None:
    pixels = encode(deep)
    level = pixels.levels[0]
    half = torch.ones_like(level.mask_features)
    half[..., ::2] = -1
    padding = level.padding.clone()
    padding[:, -3:] = True
    level = replace(level, mask_features=half, padding=padding)
    prediction = replace(
        ask(deep, "segmentation", None, pixels=pixels).final, mask_embed=torch.ones(1, O, MODEL.width)
    )
    outside = deep.decoder._cross_mask(prediction, level, torch.tensor([0]), O + 2)[0, 0]
    expected = padding[0].clone()
    assert outside[O:].tolist() == [expected.tolist()] * 2
    expected[::2] = True
    assert outside[:O].tolist() == [expected.tolist()] * O


def test_the_picture_decides(deep: XDecoder) -> None:
    a, b = (ask(deep, "segmentation", None, pixels=encode(deep, seed=seed)).final for seed in (0, 1))
    assert not torch.allclose(a.mask_embed, b.mask_embed, atol=1e-4)
    assert not torch.allclose(a.image, b.image, atol=1e-4)


def test_each_task_sentence_gives_another_answer(deep: XDecoder) -> None:
    pixels = encode(deep)
    answers = [
        ask(deep, "segmentation", None, pixels=pixels, tasks=(task,)).final for task in range(len(TASKS))
    ]
    for i, one in enumerate(answers):
        for other in answers[:i]:
            assert not torch.allclose(one.semantic, other.semantic, atol=1e-6)


def test_without_task_tokens_the_task_is_ignored() -> None:
    of = model(task_tokens=False).requires_grad_(False)
    pixels = encode(of)
    for pattern in PATTERNS:
        one, two = (ask(of, pattern, words_of(pattern), pixels=pixels, tasks=(task,)) for task in (0, 5))
        assert one.initial is None
        assert torch.equal(one.final.semantic, two.final.semantic)
        assert torch.equal(one.final.image, two.final.image)


def test_there_is_a_prediction_before_the_first_and_behind_every_layer(deep: XDecoder) -> None:
    outputs = ask(deep, "captioning", PHRASE)
    assert len(outputs.predictions) == 1 + 3
    for prediction in outputs.predictions:
        assert prediction.semantic.shape == prediction.mask_embed.shape == (1, O, MODEL.width)
        assert prediction.image.shape == (1, MODEL.width)
        assert prediction.text is not None and prediction.text.shape == (1, 5, MODEL.width)
    assert outputs.initial is not None and outputs.initial.shape == (1, O + 1, MODEL.width)


def test_the_queries_know_the_picture_before_the_first_layer(deep: XDecoder) -> None:
    """OneFormer's original swaps values and positions, and its initial queries hold no picture."""
    a, b = (ask(deep, "segmentation", None, pixels=encode(deep, seed=seed)).initial for seed in (0, 1))
    assert a is not None and b is not None
    assert not torch.allclose(a[:, :O], b[:, :O], atol=1e-4)
    torch.testing.assert_close(a[:, O], b[:, O])  # the task token is the sentence alone


def test_words_reach_the_text_queries_with_gradient() -> None:
    of = model()
    text: TextFeatures = of.encode_texts([PHRASE])
    text.tokens.retain_grad()
    of.ask(
        encode(of), "referring", torch.tensor([0]), sentences(of)[[3]], text
    ).final.semantic.sum().backward()
    assert text.tokens.grad is not None and text.tokens.grad.abs().sum() > 0


def _same(together: Outputs, alone: Outputs, row: int) -> None:
    for a, b in zip(together.predictions, alone.predictions, strict=True):
        for field in ("semantic", "image", "mask_embed", "text"):
            if getattr(a, field) is not None:
                torch.testing.assert_close(getattr(a, field)[row], getattr(b, field)[0], atol=1e-5, rtol=1e-4)


def test_mask_pooling_names_a_query_by_what_its_mask_covers(deep: XDecoder) -> None:
    pixels = encode(deep)
    plain = model(decoder_layers=3, mask_pooling=False).requires_grad_(False)
    plain.load_state_dict(deep.state_dict(), strict=False)
    task, rows = deep.text(deep.task_ids).sentence[:1], torch.tensor([0])
    pooled, without = (of.ask(pixels, "segmentation", rows, task).predictions for of in (deep, plain))
    level, pooling = pixels.levels[-1], deep.decoder.pooling
    assert pooling is not None
    for with_it, bare in zip(pooled, without, strict=True):
        torch.testing.assert_close(with_it.mask_embed, bare.mask_embed)  # masks do not depend on names
        shares = (with_it.mask_embed[0] @ level.mask_features[0]).sigmoid()
        looks = (shares / shares.sum(1, keepdim=True)) @ level.memory[0]
        added = deep.decoder.class_embed(pooling.norm(pooling.project(looks)))
        torch.testing.assert_close(with_it.semantic[0], bare.semantic[0] + added, rtol=1e-4, atol=1e-5)


def test_a_region_is_named_by_its_own_pixels(deep: XDecoder) -> None:
    masks = torch.zeros(1, 3, 64, 64)
    masks[0, 0, :32], masks[0, 1, 32:], masks[0, 2, :32] = 1, 1, 1
    top, bottom, again = deep.decoder.name_regions(encode(deep), torch.tensor([0]), masks)[0]
    assert torch.equal(top, again) and not torch.allclose(top, bottom, atol=1e-3)
    assert deep.decoder.name_regions(encode(deep), torch.tensor([0]), masks[:, :0]).shape == (1, 0, 32)
