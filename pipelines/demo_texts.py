"""What can be said about a scene of `demo_scenes`: captions, referring phrases, questions with their answers.

True by construction: a phrase fits exactly one thing, an answer follows from the masks' centres and counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.demo_scenes import COLOURS, SHAPES, STUFF, THINGS, Rng, Scene, Thing

APART = 0.08  # of the image side: closer centres are neither left nor right of each other
LARGER = 1.8  # ratio of areas from which one thing is "large" and the other "small"
# Chosen by us so that a third of all phrases need their relation: the odds of each kind of phrase, and the
# share of the things told apart without any relation that are referred to at all.
PHRASE_ODDS = {"plain": 1.0, "superlative": 1.0, "relation": 4.0}
PLAIN_SHARE = 0.3
NUMBERS = ("no", "a", "two", "three", "four")

Relation = Callable[[Thing, Thing], float]  # how far the first is beyond the second, in image sides
RELATIONS: dict[str, Relation] = {
    "left of": lambda a, b: b.x - a.x,
    "right of": lambda a, b: a.x - b.x,
    "above": lambda a, b: b.y - a.y,
    "below": lambda a, b: a.y - b.y,
}
EXTREMES = {"leftmost": "left of", "rightmost": "right of", "top": "above", "bottom": "below"}


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """A phrase that fits one thing of the scene; `relation`: without its relation it would fit several."""

    text: str
    relation: bool


@dataclass(frozen=True, kw_only=True)
class Asked:
    """kind is VQA v2's `question_type`, answer_type one of "yes/no", "number", "other"."""

    question: str
    answer: str
    kind: str
    answer_type: str


# --------------------------------------------------------------------------------------------------- captions


def captions(rng: Rng, scene: Scene, number: int = 2) -> tuple[str, ...]:
    """Sentences of different form that name every thing with its count, and the ground."""
    things = _listed([_counted(scene, name) for name in THINGS if _of(scene.things, name)])
    ground = _listed([name for name in STUFF if name in {g.name for g in scene.ground}])
    forms = (f"{things} on {ground}", f"a picture of {things} on {ground}", f"{ground} with {things}")
    return tuple(forms[i] for i in rng.choice(len(forms), number, replace=False))


def _counted(scene: Scene, name: str) -> str:
    found = _of(scene.things, name)
    if any(thing.crowd for thing in found):
        return f"many {_plural(name)}"
    return f"a {name}" if len(found) == 1 else f"{NUMBERS[len(found)]} {_plural(name)}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"


# ---------------------------------------------------------------------------------------------------- phrases


def phrases(rng: Rng, scene: Scene, target: Thing) -> tuple[Phrase, ...]:
    """One to three phrases that fit `target` and nothing else; none where nothing unambiguous can be said."""
    nouns = () if target.crowd else (target.name, target.shape, f"{target.colour} shape")
    by_kind: dict[str, list[Phrase]] = {}
    for noun in nouns:
        for kind, phrase in _described(scene, target, noun):
            by_kind.setdefault(kind, []).append(phrase)
    if not by_kind or ("relation" not in by_kind and rng.random() > PLAIN_SHARE):
        return ()
    chosen = []
    for _ in range(1 + int(rng.integers(3))):
        kinds = [kind for kind in PHRASE_ODDS if by_kind.get(kind)]
        if not kinds:
            break
        odds = np.array([PHRASE_ODDS[kind] for kind in kinds])
        of_kind = by_kind[str(rng.choice(kinds, p=odds / odds.sum()))]
        chosen.append(of_kind.pop(rng.integers(len(of_kind))))
    return tuple(chosen)


def _described(scene: Scene, target: Thing, noun: str) -> list[tuple[str, Phrase]]:
    rivals = [thing for thing in _of(scene.things, noun) if thing is not target]
    if not rivals:
        return [("plain", Phrase(text=f"the {noun}", relation=False))]
    if any(rival.crowd for rival in rivals):
        return []
    superlatives = [f"the {word} {noun}" for word in _superlatives(target, rivals)]
    related = [f"the {noun} {where}" for where in _related(scene, target, rivals)]
    return [("superlative", Phrase(text=text, relation=False)) for text in superlatives] + [
        ("relation", Phrase(text=text, relation=True)) for text in related
    ]


def _superlatives(target: Thing, rivals: Sequence[Thing]) -> list[str]:
    words = [
        word
        for word, relation in EXTREMES.items()
        if all(RELATIONS[relation](target, rival) > APART for rival in rivals)
    ]
    if all(target.area > LARGER * rival.area for rival in rivals):
        words.append("large")
    if all(target.area * LARGER < rival.area for rival in rivals):
        words.append("small")
    return words


def _related(scene: Scene, target: Thing, rivals: Sequence[Thing]) -> list[str]:
    """ "left of the blue square", where that holds of the target and clearly of none of its rivals."""
    return [
        f"{word} the {noun}"
        for noun, anchor in _anchors(scene)
        if anchor is not target and not any(anchor is rival for rival in rivals)
        for word, beyond in RELATIONS.items()
        if beyond(target, anchor) > APART and all(beyond(rival, anchor) < 0 for rival in rivals)
    ]


def _anchors(scene: Scene) -> list[tuple[str, Thing]]:
    """Nouns that name exactly one thing, with that thing."""
    nouns = [*THINGS, *SHAPES]
    found = [(noun, _of(scene.things, noun)) for noun in nouns]
    return [(noun, things[0]) for noun, things in found if len(things) == 1 and not things[0].crowd]


# -------------------------------------------------------------------------------------------------- questions


def questions(rng: Rng, scene: Scene) -> tuple[Asked, ...]:
    """Up to two on colour, one on count, one on existence, and a true and a false one on position."""
    return (*_colours(rng, scene), *_count(rng, scene), *_existence(rng, scene), *_position(rng, scene))


def _colours(rng: Rng, scene: Scene) -> list[Asked]:
    unique = [(noun, thing) for noun, thing in _anchors(scene) if noun in SHAPES]
    chosen = [unique[i] for i in rng.permutation(len(unique))[:2]]
    kind = "what color is the"
    return [
        Asked(question=f"{kind} {noun}?", answer=thing.colour, kind=kind, answer_type="other")
        for noun, thing in chosen
    ]


def _count(rng: Rng, scene: Scene) -> list[Asked]:
    by_count: dict[int, list[str]] = {}
    for noun in (*THINGS, *SHAPES, *(f"{colour} shape" for colour in COLOURS), "shape"):
        found = _of(scene.things, noun)
        if not any(thing.crowd for thing in found):
            by_count.setdefault(len(found), []).append(_plural(noun))
    counts = sorted(by_count)
    count = counts[rng.integers(len(counts))]  # the count first, so that zero does not swamp the answers
    noun = by_count[count][rng.integers(len(by_count[count]))]
    question = f"how many {noun} are there?"
    return [Asked(question=question, answer=str(count), kind="how many", answer_type="number")]


def _existence(rng: Rng, scene: Scene) -> list[Asked]:
    present = rng.random() < 0.5
    there = {thing.name for thing in scene.things}
    nouns = [name for name in THINGS if (name in there) == present]
    if (
        not present and rng.random() < 0.5
    ):  # every second absent one shares its colour or shape with something
        parts = {part for name in there for part in name.split()}
        nouns = [name for name in nouns if parts & set(name.split())] or nouns
    noun = nouns[rng.integers(len(nouns))]
    return [_yes_no(f"is there a {noun}?", present, "is there a")]


def _position(rng: Rng, scene: Scene) -> list[Asked]:
    anchors = [(noun, thing) for noun, thing in _anchors(scene) if noun in THINGS]
    words = ("left of", "above")
    pairs = [
        (a, word, b)
        for a, first in anchors
        for b, second in anchors
        for word in words
        if RELATIONS[word](first, second) > APART
    ]
    if not pairs:
        return []
    chosen = [pairs[i] for i in rng.integers(len(pairs), size=2)]
    true, false = (
        _yes_no(f"is the {first} {word} the {second}?", answer, "is the")
        for answer, (first, word, second) in ((True, chosen[0]), (False, chosen[1][::-1]))
    )
    return [true, false]


def _yes_no(question: str, answer: bool, kind: str) -> Asked:
    return Asked(question=question, answer="yes" if answer else "no", kind=kind, answer_type="yes/no")


def _of(things: Sequence[Thing], noun: str) -> list[Thing]:
    """Things that a noun fits: a class name, a shape, "red shape" or "shape"."""
    return [thing for thing in things if noun in (thing.name, thing.shape, f"{thing.colour} shape", "shape")]
