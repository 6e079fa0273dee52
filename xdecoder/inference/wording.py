"""Words of captions, answers and class names, made comparable by plain rules on strings."""

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+(?:['’]\w+)*")

# Endings of COCO's panoptic class names that nobody says ("wall-other-merged").
_SUFFIX = re.compile(r"(-other|-merged|-stuff)+$")

_IRREGULAR = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
}

_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}

_ARTICLES = frozenset({"a", "an", "the"})

# Contractions that are no other word without their apostrophe (unlike "its" or "well").
_CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how's i'm
i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't o'clock shan't she's should've
shouldn't somebody's someone's that's there'd there's they'd they'll they're they've wasn't we've weren't
what'll what's when's where's who'd who'll who's why's won't would've wouldn't y'all you'd you'll you're
you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; an apostrophe inside a word stays, a hyphen divides."""
    return _WORD.findall(text.lower())


def normalise_answer(answer: str) -> str:
    """An answer as VQA v2 compares it (visualqa.org/evaluation).

    Lower case, no periods but in decimals, no commas inside numbers, other punctuation a space except
    apostrophe and colon, digits for number words, no articles, apostrophes in contractions.
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", answer.lower().replace("’", "'"))
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s.':]|_", " ", text)
    kept = (_DIGITS.get(word, word) for word in text.split() if word not in _ARTICLES)
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)


class ClassNames:
    """Finds which classes a text names, in the singular or the plural.

    A class name may list synonyms separated by commas; its endings "-merged", "-other" and "-stuff" are not
    said. Where one name lies inside another ("dog" in "hot dog"), the longer one is meant.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._classes: dict[tuple[str, ...], str] = {}
        for name in names:
            for synonym in name.split(","):
                said = words(_SUFFIX.sub("", synonym.strip()))
                for last in _forms(said[-1]) if said else ():
                    self._classes.setdefault((*said[:-1], last), name)
        self._longest = max(map(len, self._classes), default=0)

    def named(self, text: str) -> frozenset[str]:
        """The classes that the text names, as they were given."""
        said, found, at = words(text), set(), 0
        while at < len(said):
            sizes = range(min(self._longest, len(said) - at), 0, -1)
            size = next((n for n in sizes if tuple(said[at : at + n]) in self._classes), 0)
            if size:
                found.add(self._classes[tuple(said[at : at + size])])
            at += max(size, 1)
        return frozenset(found)


def _forms(word: str) -> tuple[str, ...]:
    """A noun and how its plural (or, given a plural, its singular) may be written; too many do no harm."""
    forms = [word, word + "s", word + "es"]
    if word in _IRREGULAR:
        forms.append(_IRREGULAR[word])
    if word.endswith("y"):
        forms.append(word[:-1] + "ies")
    if word.endswith(("f", "fe")):
        forms.append(word.rstrip("e")[:-1] + "ves")
    if word.endswith("s") and not word.endswith("ss"):
        forms.append(word[:-1])
    return tuple(forms)
