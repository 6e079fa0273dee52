"""Laws of the words: texts and ids are one another's reverse, OneFormer's sentences, mirrored sides."""

import math

import pytest
import torch

from schemas.tasks import TASKS
from xdecoder.prompts import (
    END,
    PAD,
    START,
    _ids,
    clean,
    detokenize,
    mirror,
    nouns,
    query_texts,
    synonyms,
    task_prompt,
    tokenize,
)


@pytest.mark.parametrize("text", ["a red circle", "what is 2+2?", "wow!(really)", "naïve café"])
def test_a_text_comes_back_from_its_ids(text: str) -> None:
    row = tokenize([text], 77)[0].tolist()
    assert row[0] == START and row[-1] == END
    said = detokenize(row[1:])
    assert said.replace(" ", "") == text.replace(" ", "")


def test_detokenize_stops_at_the_first_end() -> None:
    first, second = tokenize(["a dog", "a cat"], 77).tolist()
    assert detokenize(first + second) == "a dog"


def test_a_corpus_of_captions_is_not_remembered() -> None:
    for remembers in (_ids, clean):
        assert (remembers.cache_info().maxsize or math.inf) <= 1 << 16


def test_texts_are_padded_to_the_longest_and_no_further() -> None:
    ids = tokenize(["dog", "a dog on a hill"], 77)
    assert ids.shape == (2, 7) and ids.dtype == torch.int64
    assert ids[0].tolist()[2:] == [END, PAD, PAD, PAD, PAD]
    assert tokenize([], 77).shape == (0, 2)
    assert tokenize([""], 77).tolist() == [[START, END]]


def test_a_long_text_is_cut_but_keeps_its_end() -> None:
    ids = tokenize(["dog " * 100], 9)
    assert ids.shape == (1, 9)
    assert ids[0, 0] == START and ids[0, -1] == END


def test_class_names_become_words() -> None:
    assert clean("wall-other-merged") == clean("wall") == "wall"
    assert clean("Door_stuff") == "door stuff" and clean("door-stuff") == "door"
    assert synonyms("car, auto,  automobile-merged") == ("car", "auto", "automobile")


def test_the_list_of_texts_is_that_of_oneformer() -> None:
    classes = ["apple", "grass-merged", "grass-merged"]
    texts = query_texts("panoptic", classes, 5)
    assert texts == ["a photo with a apple", *["a photo with a grass"] * 2, *["a panoptic photo"] * 2]
    assert query_texts("instance", [], 2) == ["an instance photo"] * 2
    assert query_texts("semantic", [], 1) == ["a semantic photo"]


def test_the_list_of_texts_has_the_asked_length_whatever_the_targets() -> None:
    for targets in (0, 3, 4, 9):
        assert len(query_texts("panoptic", ["dog"] * targets, 4)) == 4


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("A man with two dogs on top of a red surfboard.", ("man", "dogs", "red surfboard")),
        ("grass, water and a purple cross", ("grass", "water", "purple cross")),
        ("a dog, another dog and the dog's T-shirt", ("dog", "dog's t-shirt")),
        ("3 of them, 25% off!", ()),
        ("There's a dog that isn\u2019t black; it\u2019s a woman's hat", ("dog", "black", "woman's hat")),
        ("", ()),
        ("Übergrößen über einem Hügel", ("übergrößen über einem hügel",)),  # English alone is taken apart
    ],
)
def test_a_caption_speaks_of_what_stands_between_its_function_words(
    caption: str, phrases: tuple[str, ...]
) -> None:
    assert nouns(caption) == phrases


def test_each_task_has_a_sentence_of_its_own() -> None:
    assert task_prompt("panoptic") == "the task is panoptic"
    assert len({task_prompt(task) for task in TASKS}) == len(TASKS)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("the left dog, right of a cat", "the right dog, left of a cat"),
        ("Leftmost one", "Rightmost one"),
        ("left-hand, lefthand, leftside", "right-hand, righthand, rightside"),
        ("moving leftward, then rightwards", "moving rightward, then leftwards"),
        ("bright leftover copyright", "bright leftover copyright"),
        ("above the tree", "above the tree"),
    ],
)
def test_a_mirror_swaps_sides_and_nothing_else(text: str, seen: str) -> None:
    assert mirror(text) == seen
    assert mirror(seen) == text
