"""A taxonomy: the ordered list of classes that a corpus labels, each a thing or stuff, each seen in training
or not.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, model_validator


class Category(BaseModel):
    """One class. `name` may list synonyms separated by commas; `seen` is false where no training mask has
    it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    isthing: bool
    seen: bool = True


class Taxonomy(BaseModel):
    """Classes in their fixed order; names are unique.

    Raises `ValueError` (pydantic) where a name stands twice or the list is empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    categories: tuple[Category, ...]

    @model_validator(mode="after")
    def _unique(self) -> "Taxonomy":
        names = Counter(c.name for c in self.categories)
        twice = sorted(name for name, count in names.items() if count > 1)
        if not names or twice:
            raise ValueError(
                f"taxonomy {self.name!r}: " + (f"names stand twice: {twice}" if twice else "no classes")
            )
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.categories)

    @property
    def things(self) -> frozenset[str]:
        return frozenset(c.name for c in self.categories if c.isthing)

    def seen(self) -> "Taxonomy":
        """The same taxonomy without the classes that have no mask in training."""
        return Taxonomy(name=self.name, categories=tuple(c for c in self.categories if c.seen))


def contradiction(named: Iterable[tuple[str, Taxonomy]]) -> tuple[str, str, str] | None:
    """A class that is a thing in one and stuff in another, and the names of the two; None where none is.

    Predictions carry the name of a class alone.
    """
    kinds: dict[str, tuple[bool, str]] = {}
    for name, taxonomy in named:
        for category in taxonomy.categories:
            isthing, other = kinds.setdefault(category.name, (category.isthing, name))
            if isthing != category.isthing:
                return category.name, other, name
    return None


class ClassFile(BaseModel):
    """A class list as a file: the names by the id that a corpus gives them, and how its label maps hold ids.

    encoding    "index": a pixel is the id, and 0 is void; "index_from_0": a pixel is the id less one
    void        ids that are no class
    divisor     ids of `divisor` and more are id x `divisor` + number of the instance; 0 where there are none
    unseen      classes that the zero-shot protocol of the corpus keeps out of training
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    things: dict[int, str] = {}
    stuff: dict[int, str] = {}
    encoding: Literal["index", "index_from_0"] = "index"
    void: frozenset[int] = frozenset()
    divisor: int = 0
    unseen: frozenset[str] = frozenset()

    @model_validator(mode="after")
    def _consistent(self) -> "ClassFile":
        if twice := sorted(self.things.keys() & self.stuff.keys()):
            raise ValueError(f"ids stand among things and stuff: {twice}")
        if taken := sorted(self.void & (self.things.keys() | self.stuff.keys())):
            raise ValueError(f"ids are void and a class: {taken}")
        if unknown := sorted(self.unseen - {*self.things.values(), *self.stuff.values()}):
            raise ValueError(f"unseen classes that are not listed: {unknown}")
        return self

    def taxonomy(self, name: str) -> Taxonomy:
        """The classes in the order of their ids."""
        rows = sorted(
            [(i, n, True) for i, n in self.things.items()] + [(i, n, False) for i, n in self.stuff.items()]
        )
        categories = (Category(name=n, isthing=thing, seen=n not in self.unseen) for _, n, thing in rows)
        return Taxonomy(name=name, categories=tuple(categories))


def class_file(path: Path) -> ClassFile:
    """Read a class list. Raises `ValueError` that names the file."""
    try:
        return ClassFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not a class list: {error!s:.400}") from None


@cache
def shipped_file(name: str) -> ClassFile:
    """A class list of `schemas/taxonomies`. Raises `ValueError` that lists them."""
    if name not in SHIPPED:
        raise ValueError(f"no class list {name!r} is shipped; there are {sorted(SHIPPED)}")
    return class_file(SHIPPED[name])


def shipped(name: str) -> Taxonomy:
    """The classes of a shipped list. Raises `ValueError`."""
    return shipped_file(name).taxonomy(name)


SHIPPED = {path.stem: path for path in (Path(__file__).parent / "taxonomies").glob("*.yaml")}
