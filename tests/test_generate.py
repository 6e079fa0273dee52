"""Laws of captioning: what is kept changes no word, and the search finds what a plain search finds.

The plain search decodes every caption from its first word, one at a time, with Python lists.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tiny import model
from torch import Tensor

from schemas.jobs import CaptionConfig
from schemas.tasks import TASKS
from xdecoder.inference.generate import Search, captions, greedy
from xdecoder.model.decoder import Pixels
from xdecoder.model.xdecoder import XDecoder
from xdecoder.prompts import END, START, detokenize, tokenize


def talkative(seed: int, **changes: Any) -> XDecoder:
    """A model whose words depend on the picture and on the words before."""
    of = model(seed, **({"decoder_layers": 3} | changes)).requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for name, weight in of.named_parameters():
        if weight.ndim > 1 and "backbone" not in name:
            weight += 0.15 * torch.randn(weight.shape, generator=draw)
    return of


def brief() -> XDecoder:
    """A model that ends its captions of pictures 0 and 1 at different places: the end mark sounds like a word
    that it says of both.
    """
    of = talkative(0, task_tokens=False)  # whose sentences end, too
    one, two = (spoken(of, encode(of, 2), image, 8) for image in (0, 1))
    both = [word for word in {*one} & {*two} if one.index(word) != two.index(word)]
    word = max(both, key=lambda word: min(one.index(word), two.index(word)))
    of.text.token_embedding.weight[END] = 1.001 * of.text.token_embedding.weight[word]
    return of


def encode(of: XDecoder, count: int) -> Pixels:
    """Pictures of which the last half is padding in every second one."""
    images = torch.rand(count, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    padding = torch.zeros(count, 32, 64, dtype=torch.bool)
    padding[1::2, :, 32:] = True
    return of.encode(images, padding)


def task_of(of: XDecoder, count: int) -> Tensor:
    return of.text(of.task_ids).sentence[[TASKS.index("captioning")] * count]


def decoded(of: XDecoder, pixels: Pixels, image: int, ids: Sequence[int]) -> Tensor:
    """The next word's logits of one caption, float[V], everything decoded anew."""
    text = of.text(torch.tensor([[*ids, END]]))  # an end is lent, so that all words count as text
    slots = of.ask(pixels, "captioning", torch.tensor([image]), task_of(of, 1), text).final.text
    assert slots is not None
    return of.caption_logits(slots[0, len(ids) - 1])


def spoken(of: XDecoder, pixels: Pixels, image: int, max_tokens: int) -> list[int]:
    ids = [START]
    while len(ids) <= max_tokens and ids[-1] != END:
        ids.append(int(decoded(of, pixels, image, ids).argmax()))
    return ids[1:]


@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("tokens", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_greedy_words_are_those_of_full_decoding(seed: int, tokens: bool, pooling: bool) -> None:
    of = talkative(seed, task_tokens=tokens, mask_pooling=pooling)
    pixels, images = encode(of, 3), torch.tensor([2, 0, 1])
    said = greedy(of, pixels, images, task_of(of, 3), 12)
    assert said == [detokenize(spoken(of, pixels, int(image), 12)) for image in images]
    assert len(set(said)) > 1, "the pictures must matter"


@pytest.mark.parametrize("levels", [1, 2])
def test_words_look_at_the_levels_that_the_model_looks_at(levels: int) -> None:
    of = talkative(0, decoder_levels=levels)
    pixels, images = encode(of, 3), torch.arange(3)
    said = greedy(of, pixels, images, task_of(of, 3), 12)
    assert said == [detokenize(spoken(of, pixels, int(image), 12)) for image in images]


def test_nothing_is_decoded_behind_the_end_of_the_longest_caption() -> None:
    of = brief()
    pixels, steps = encode(of, 2), list[int]()
    lengths = [len(spoken(of, pixels, image, 19)) for image in (0, 1)]
    hook = of.caption_embed.register_forward_hook(lambda *_: steps.append(1))
    greedy(of, pixels, torch.arange(2), task_of(of, 2), 19)
    hook.remove()
    assert len(set(lengths)) == 2 and len(steps) == max(lengths) < 19


def test_the_picture_is_decoded_once_and_words_pass_alone() -> None:
    of = talkative(0)
    pixels, task = encode(of, 1), task_of(of, 1)
    rows: list[tuple[int, ...]] = []
    hooks = [
        of.decoder.layers[0].ffn.register_forward_pre_hook(lambda _, x: rows.append(tuple(x[0].shape[:2]))),
        of.text.blocks[0].register_forward_pre_hook(lambda _, x: rows.append(tuple(x[0].shape[:2]))),
    ]
    greedy(of, pixels, torch.tensor([0]), task, 5)
    for hook in hooks:
        hook.remove()
    assert rows == [(1, of.config.latents + 2)] + [(1, 1)] * 10  # then five words through both


# name, what is asked of the search
SEARCHES = {
    "two beams": Search(beams=2),
    "four beams": Search(beams=4),
    "the plain sum": Search(beams=3, length_penalty=0),
    "long ones favoured": Search(beams=3, length_penalty=3),
    "short ones favoured": Search(beams=3, length_penalty=-1),
    "no word twice": Search(beams=3, no_repeat=1),
    "no pair twice": Search(beams=3, no_repeat=2),
    "no triple twice, greedy": Search(no_repeat=3),
    "no word twice, greedy": Search(no_repeat=1),
    "at least five, greedy": Search(min_tokens=5),
    "at least four": Search(beams=3, min_tokens=4, no_repeat=2),
}


def searched(of: XDecoder, pixels: Pixels, image: int, max_tokens: int, search: Search) -> str:
    """Beam search as a textbook has it."""
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []

    def value(score: float, words: Sequence[int]) -> float:
        return score / len(words) ** search.length_penalty

    for _ in range(max_tokens):
        ways = sorted(_ways(of, pixels, image, alive, search), key=lambda way: -way[0])
        ended += [(value(*way), way[1]) for way in ways[: search.beams] if way[1][-1] == END]
        alive = [way for way in ways[: 2 * search.beams] if way[1][-1] != END][: search.beams]
        if len(ended) >= search.beams:
            break
    else:
        ended += [(value(*way), way[1]) for way in alive]
    return detokenize(max(ended, key=lambda pair: pair[0])[1])


def _ways(
    of: XDecoder, pixels: Pixels, image: int, alive: list[tuple[float, list[int]]], search: Search
) -> Iterator[tuple[float, list[int]]]:
    for score, words in alive:
        gains = decoded(of, pixels, image, [START, *words]).double().log_softmax(-1)
        said = [tuple(words[i : i + search.no_repeat]) for i in range(len(words) - search.no_repeat + 1)]
        for word in gains.topk(40).indices.tolist():
            last = tuple([*words, word][-search.no_repeat :])
            if search.no_repeat and len(last) == search.no_repeat and last in said:
                continue
            if word != END or len(words) >= search.min_tokens:
                yield score + float(gains[word]), [*words, word]


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_the_search_finds_what_a_plain_search_finds(search: Search) -> None:
    of = brief()
    pixels, images = encode(of, 2), torch.tensor([1, 0])
    said = captions(of, pixels, images, task_of(of, 2), 8, search)
    assert said == [searched(of, pixels, int(image), 8, search) for image in images]


def test_searches_differ_and_keep_their_rules() -> None:
    of = brief()
    pixels, images, task = encode(of, 2), torch.arange(2), task_of(of, 2)

    def said(name: str) -> list[list[int]]:
        texts = captions(of, pixels, images, task, 8, SEARCHES[name])
        return [tokenize([text], 100)[0, 1:-1].tolist() for text in texts]

    for name, run in (("no word twice", 1), ("no pair twice", 2), ("no triple twice, greedy", 3)):
        for found in said(name):
            runs = [tuple(found[i : i + run]) for i in range(len(found) - run + 1)]
            assert len(set(runs)) == len(runs), (name, found)
    assert sum(map(len, said("short ones favoured"))) < sum(map(len, said("long ones favoured")))
    assert min(map(len, said("two beams"))) < 5 <= min(map(len, said("at least five, greedy")))


def test_the_job_files_captions_are_greedy_unless_said_otherwise() -> None:
    assert Search(**CaptionConfig().model_dump()) == Search()
    assert Search(**CaptionConfig(beams=5, no_repeat=3).model_dump()) == Search(beams=5, no_repeat=3)


@pytest.mark.parametrize("wrong", [{"beams": 0}, {"min_tokens": -1}, {"no_repeat": -1}])
def test_a_search_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} is .*must be at least"):
        Search(**wrong)  # type: ignore[arg-type]


def test_words_of_a_region_look_at_nothing_else() -> None:
    of = talkative(1)
    region = torch.zeros(1, 32, 64, dtype=torch.bool)
    region[:, :, :16] = True
    pixels = encode(of, 1)
    outside = [
        h.outside[0, 0, 0] for h in of.decoder.listen(pixels, torch.tensor([0]), task_of(of, 1), 1, region)
    ]
    for hidden, level in zip(outside, pixels.levels, strict=True):
        assert hidden.view(level.grid).all(0).tolist() == [
            4 * c >= level.grid[1] for c in range(level.grid[1])
        ]
    everywhere = captions(of, pixels, torch.tensor([0]), task_of(of, 1), 8, Search())
    there = captions(of, pixels, torch.tensor([0]), task_of(of, 1), 8, Search(), region)
    nowhere = captions(of, pixels, torch.tensor([0]), task_of(of, 1), 8, Search(), region & False)
    assert there != everywhere and nowhere == everywhere
