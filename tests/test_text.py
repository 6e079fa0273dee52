"""Laws of the text encoder: causal, blind to padding, and every distinct text encoded once."""

import pytest
import torch

from schemas.jobs import TextConfig
from xdecoder.model.text import TextEncoder
from xdecoder.prompts import VOCABULARY_SIZE, tokenize

TEXTS = ["a red circle on grass", "dog", "the task is panoptic", "a red circle on sand"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(32, TextConfig(layers=2, heads=2, context=16)).eval().requires_grad_(False)


def test_no_token_sees_a_later_one(encoder: TextEncoder) -> None:
    ids = tokenize(TEXTS[:1], 16)
    whole = encoder(ids).tokens
    for place in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 7) % VOCABULARY_SIZE
        other = encoder(changed).tokens
        assert torch.equal(other[:, :place], whole[:, :place])
        assert not torch.allclose(other[:, place:], whole[:, place:])


def test_padding_does_not_change_a_text(encoder: TextEncoder) -> None:
    together = encoder(tokenize(TEXTS, 16))
    for i, text in enumerate(TEXTS):
        alone = encoder(tokenize([text], 16))
        length = alone.tokens.shape[1]
        torch.testing.assert_close(together.tokens[i, :length], alone.tokens[0])
        torch.testing.assert_close(together.sentence[i], alone.sentence[0])
        assert together.padding[i].tolist() == [place >= length for place in range(together.ids.shape[1])]


def test_only_what_stands_behind_the_end_is_padding(encoder: TextEncoder) -> None:
    texts = ["wow!(really)", "a much longer text than that one is"]
    ids = tokenize(texts, 16)
    assert 0 in ids[0, :5], "the vocabulary's first token is a word too, '!' before another sign"
    lengths = [tokenize([text], 16).shape[1] for text in texts]
    assert (~encoder(ids).padding).sum(1).tolist() == lengths


def test_short_texts_do_not_pay_for_long_ones(encoder: TextEncoder) -> None:
    places: list[int] = []
    hook = encoder.blocks[0].register_forward_pre_hook(
        lambda _, inputs: places.append(inputs[0].shape[:2].numel())
    )
    encoder(tokenize(["dog", "cat", "a red circle on the grass left of a dog"], 16))
    hook.remove()
    assert sum(places) == 2 * 4 + 12, "two texts of three tokens in the first third of twelve, one of twelve"


def test_equal_texts_are_encoded_once_and_give_equal_rows(encoder: TextEncoder) -> None:
    rows: list[int] = []
    hook = encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    features = encoder(tokenize([*TEXTS, *TEXTS[:2]], 16))
    hook.remove()
    assert sum(rows) == len(TEXTS)
    assert torch.equal(features.sentence[:2], features.sentence[-2:])
    assert torch.equal(features.tokens[:2], features.tokens[-2:])


def test_several_groups_in_one_pass_equal_each_alone(encoder: TextEncoder) -> None:
    groups = [tokenize(texts, 16) for texts in (TEXTS, TEXTS[:1], [], TEXTS[2:])]
    for ids, part in zip(groups, encoder.several(groups), strict=True):
        alone = encoder(ids)
        assert torch.equal(part.ids, ids) and torch.equal(part.padding, alone.padding)
        torch.testing.assert_close(part.tokens, alone.tokens)
        torch.testing.assert_close(part.sentence, alone.sentence)


def test_the_sentence_is_the_token_at_the_first_end(encoder: TextEncoder) -> None:
    ids = tokenize(["dog " * 40, "a dog"], 16)
    features = encoder(ids)
    torch.testing.assert_close(features.sentence[0], features.tokens[0, 15])
    torch.testing.assert_close(features.sentence[1], features.tokens[1, 3])


def test_a_text_longer_than_the_context_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="17 tokens.*reads 16"):
        encoder(tokenize(["dog " * 40], 17))


def test_texts_meet_gradients_also_where_they_are_shared() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(32, TextConfig(layers=1, heads=2, context=16))
    encoder(tokenize(["dog", "dog", "cat"], 16)).sentence.sum().backward()
    rows = encoder.token_embedding.weight.grad.abs().sum(1).nonzero().flatten()
    assert len(rows) == 4  # start, end, dog, cat
