"""Words: the tokenizer, how class names and tasks become sentences, and what a flip does to left and right.

Letters: `N` texts, `T` tokens. Every text of the project becomes ids here and nowhere else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import open_clip
import torch
from torch import Tensor

from schemas.tasks import Task
from schemas.taxonomy import Taxonomy

START, END, PAD = 49406, 49407, 0  # open_clip's byte-pair vocabulary; the original pads with END instead
VOCABULARY_SIZE = 49408
_REMEMBERED = 1 << 16  # chosen by us: three times the longest class list, and no corpus of captions


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The names a training speaks of: its classes (only those with masks) and the answers that VQA chooses
    among.
    """

    taxonomy: Taxonomy
    answers: tuple[str, ...]


@cache
def _tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


@lru_cache(maxsize=_REMEMBERED)
def _ids(text: str) -> tuple[int, ...]:
    if len(_tokenizer().cache) > 4 * _REMEMBERED:  # it keeps every word that it ever met
        _tokenizer.cache_clear()
    return tuple(_tokenizer().encode(text))


def tokenize(texts: Sequence[str], context: int) -> Tensor:
    """Texts -> int64[N, T] with start and end, padded with 0 to the longest of them, cut at `context` tokens.

    A text that is cut keeps its end token, so that its sentence embedding exists. No texts give int64[0, 2].
    """
    rows = [(START, *_ids(text)[: context - 2], END) for text in texts]
    longest = max((len(row) for row in rows), default=2)
    padded = [[*row, *([PAD] * (longest - len(row)))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), longest)


def detokenize(ids: Sequence[int]) -> str:
    """Token ids, up to the first end token -> text."""
    kept: list[int] = []
    for token in ids:
        if token == END:
            break
        if token != START:  # PAD is also the word "!" before another sign
            kept.append(int(token))
    return str(_tokenizer().decode(kept)).strip()


@lru_cache(maxsize=_REMEMBERED)
def clean(name: str) -> str:
    """A class name as words: COCO's "-merged", "-other", "-stuff" go, separators become spaces (X-Decoder,
    4.4).
    """
    for suffix in ("-merged", "-other", "-stuff"):
        name = name.removesuffix(suffix)
    return re.sub(r"[\s+_-]+", " ", name).strip().lower()


def synonyms(name: str) -> tuple[str, ...]:
    """The names of a class, which a taxonomy separates with commas."""
    return tuple(clean(part) for part in name.split(",") if part.strip()) or (clean(name),)


def task_prompt(task: Task) -> str:
    """The sentence behind a task token (OneFormer, "The task is {task}")."""
    return f"the task is {task}"


def query_texts(task: Task, classes: Sequence[str], count: int) -> list[str]:
    """OneFormer's text list of an image: a sentence for each target, in class order, filled up to `count`.

    classes    the class of each target, in the order of the taxonomy
    """
    article = "an" if task == "instance" else "a"  # a fact of the sentence's spelling (OneFormer, 1.4)
    texts = [f"a photo with a {clean(name)}" for name in classes][:count]
    return texts + [f"{article} {task} photo"] * (count - len(texts))


# English words that name nothing by themselves: what stands between them may. Chosen by us: articles,
# pronouns, conjunctions, auxiliaries, amounts, prepositions and places, words for the picture itself.
_BETWEEN = """
a an the this that these those his her its their our your my he she it they we you i him them him us who which
what where there here and or but nor so as while when than if not no is are was were be been being am has have
had having do does did can could may might will would one two three four five six seven eight nine ten many
few several some any each every both all more most much other another lot lots pair couple group bunch of in
on at to from by with without into onto over under above below beneath beside between behind before after
against along across around through near next inside outside upon off up down out about toward towards left
right top bottom middle front back side leftmost rightmost together very also photo picture image view
"""
_FUNCTION_WORDS = frozenset(_BETWEEN.split())
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|[^\s\w]|\d+")


def nouns(caption: str) -> tuple[str, ...]:
    """What a caption speaks of, each phrase once: runs of words between function words, numbers and marks.

    The candidates of RAKE (Rose et al. 2010), in the place of X-Decoder's tagger.
    """
    runs: list[list[str]] = [[]]
    for word in _WORD.findall(caption.lower().replace("\u2019", "'")):
        stem = word.partition("'")[0]  # of "there's" and "it's"
        if stem in _FUNCTION_WORDS or word.endswith("n't") or not word[0].isalpha():
            runs.append([])
        else:
            runs[-1].append(word)
    return tuple(dict.fromkeys(" ".join(run) for run in runs if run))


_MIRROR = {"left": "right", "right": "left"}
_SIDES = re.compile(r"\b(left|right)(?=(?:most|hand|side|wards?)?\b)", re.IGNORECASE)


def mirror(text: str) -> str:
    """What a phrase says of the picture's mirror image: left and right change places (the originals forget
    this).
    """

    def swap(match: re.Match[str]) -> str:
        word = match.group(0)
        swapped = _MIRROR[word.lower()]
        return swapped.capitalize() if word[0].isupper() else swapped

    return _SIDES.sub(swap, text)
