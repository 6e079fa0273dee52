"""A taxonomy: the ordered list of classes that a corpus labels, each a thing or stuff, each seen in training
or not.
"""

from collections import Counter
from pathlib import Path

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


def shipped(name: str) -> Taxonomy:
    """A taxonomy of `schemas/taxonomies`: names of things, then of stuff."""
    path = Path(__file__).parent / "taxonomies" / f"{name}.yaml"
    kinds: dict[str, list[str]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = ((entry, kind == "things") for kind, entries in kinds.items() for entry in entries)
    return Taxonomy(name=name, categories=tuple(Category(name=n, isthing=thing) for n, thing in rows))
