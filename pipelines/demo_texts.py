"""What can be said about a scene of `demo_scenes`: captions, referring phrases, questions with their answers.

Everything is true by construction: a phrase fits exactly one thing, an answer follows from the masks' centres and counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipelines.demo_scenes import COLOURS, SHAPES, STUFF, THINGS, Rng, Scene, Thing

APART = 0.08  # of the image side: closer centres are neither left nor right of each other
LARGER = 1.8  # ratio of areas from which one thing is "large" and the other "small"
PHRASE_SHARES = {
    "plain": 1.0,
    "superlative": 1.0,
    "relation": 3.0,
}  # chosen by us: a third of phrases must relate
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
    """A phrase that fits one thing of the scene only; `relation` where it would fit several without its relation."""

    text: str
    relation: bool


@dataclass(frozen=True, kw_only=True)
class Asked:
    """kind is VQA v2's `question_type`, answer_type one of "yes/no", "number", "other"."""

    question: str
    answer: str
    kind: str
    answer_type: str


# ------------------------------------------------------------------------------------------------------ captions


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


# ------------------------------------------------------------------------------------------------------ phrases


def phrases(rng: Rng, scene: Scene, target: Thing) -> tuple[Phrase, ...]:
    """One to three phrases that fit `target` and nothing else; none where nothing unambiguous can be said."""
    candidates = [
        (kind, phrase)
        for noun in (target.name, target.shape)
        for kind, phrase in _described(scene, target, noun)
    ]
    if not candidates or target.crowd:
        return ()
    weights = [PHRASE_SHARES[kind] / sum(k == kind for k, _ in candidates) for kind, _ in candidates]
    number = min(1 + int(rng.integers(3)), len(candidates))
    shares = [weight / sum(weights) for weight in weights]
    return tuple(candidates[i][1] for i in rng.choice(len(candidates), number, replace=False, p=shares))


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


# ------------------------------------------------------------------------------------------------------ questions


def questions(rng: Rng, scene: Scene) -> tuple[Asked, ...]:
    """One question of each kind that the scene allows: colour, count, existence, position."""
    asked = (_colour(rng, scene), _count(rng, scene), _existence(rng, scene), _position(rng, scene))
    return tuple(question for question in asked if question)


def _colour(rng: Rng, scene: Scene) -> Asked | None:
    unique = [(noun, thing) for noun, thing in _anchors(scene) if noun in SHAPES]
    if not unique:
        return None
    noun, thing = unique[rng.integers(len(unique))]
    return Asked(
        question=f"what color is the {noun}?",
        answer=thing.colour,
        kind="what color is the",
        answer_type="other",
    )


def _count(rng: Rng, scene: Scene) -> Asked | None:
    by_count: dict[int, list[str]] = {}
    for noun in (*THINGS, *SHAPES, *COLOURS):
        found = _of(scene.things, noun)
        if not any(thing.crowd for thing in found):
            by_count.setdefault(len(found), []).append(f"{noun} shapes" if noun in COLOURS else _plural(noun))
    if not any(thing.crowd for thing in scene.things):
        by_count.setdefault(len(scene.things), []).append("shapes")
    counts = sorted(by_count)
    count = counts[rng.integers(len(counts))]  # the count first, so that zero does not swamp the answers
    noun = by_count[count][rng.integers(len(by_count[count]))]
    return Asked(
        question=f"how many {noun} are there?", answer=str(count), kind="how many", answer_type="number"
    )


def _existence(rng: Rng, scene: Scene) -> Asked:
    present = rng.random() < 0.5
    there = {thing.name for thing in scene.things}
    nouns = [name for name in THINGS if (name in there) == present]
    if (
        not present and rng.random() < 0.5
    ):  # every second absent one shares its colour or shape with something
        parts = {part for name in there for part in name.split()}
        nouns = [name for name in nouns if parts & set(name.split())] or nouns
    noun = nouns[rng.integers(len(nouns))]
    return _yes_no(f"is there a {noun}?", present, "is there a")


def _position(rng: Rng, scene: Scene) -> Asked | None:
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
        return None
    first, word, second = pairs[rng.integers(len(pairs))]
    true = bool(rng.random() < 0.5)
    first, second = (first, second) if true else (second, first)
    return _yes_no(f"is the {first} {word} the {second}?", true, "is the")


def _yes_no(question: str, answer: bool, kind: str) -> Asked:
    return Asked(question=question, answer="yes" if answer else "no", kind=kind, answer_type="yes/no")


def _of(things: Sequence[Thing], noun: str) -> list[Thing]:
    """Things that a class name, a shape or a colour fits."""
    return [thing for thing in things if noun in (thing.name, thing.shape, thing.colour)]
