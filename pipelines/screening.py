"""What a corpus's rows may hold, by settings: captions and licences. A refusal is a reject with a reason.

Captions of evaluation splits are only refused where they are no text at all: a benchmark stays whole.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import chain
from typing import get_args

from pipelines import captions
from pipelines.corpora.licences import forms
from pipelines.corpora.rows import MAX_DETAIL, Row
from pipelines.curate import reject
from schemas.jobs import CaptionRules, CurateConfig, LicenceRules
from schemas.records import Reject

# Refused because somebody asked for it, or for another image's sake (grouping.py): no sign of broken data.
CHOSEN = ("licence", "near-duplicate", "leakage", "duplicate-labels", *get_args(captions.Asked))


def screen(
    items: Iterable[Row | Reject], config: CurateConfig, repeated: frozenset[int]
) -> Iterator[Row | Reject]:
    """The items of a reader, less what the settings refuse, which become rejects.

    A row that loses all it said is not there any more: its captions are the rejects.
    `repeated` is of pipelines/captions.py, over the corpus.
    """
    for item in items:
        if isinstance(item, Reject):
            yield item
        elif why := unlicensed(item, config.licences):
            yield reject(item, "licence", why[:MAX_DETAIL])
        else:
            yield from _captions(item, config.captions, repeated)


def all_captions(items: Iterable[Row | Reject]) -> Iterator[str]:
    return chain.from_iterable(item.captions for item in items if isinstance(item, Row))


def unlicensed(row: Row, rules: LicenceRules) -> str:
    """Why the licences of a row's sources do not allow its use, or nothing."""
    for licence in dict.fromkeys(source.licence.strip() for source in (row.source, *row.origins)):
        if not licence:
            if rules.unknown == "reject":
                return "no licence is stated"
        elif pattern := _match(licence, rules.deny):
            return f"{licence!r} matches {pattern!r}, which is denied"
        elif rules.allow and not _match(licence, rules.allow):
            return f"{licence!r} is not among the allowed"
    return ""


def _match(licence: str, patterns: Iterable[str]) -> str:
    said = [form.casefold() for form in forms(licence)]
    return next((p for p in patterns if any(fnmatchcase(form, p.casefold()) for form in said)), "")


def _captions(row: Row, rules: CaptionRules, repeated: frozenset[int]) -> Iterator[Row | Reject]:
    if row.split != "train":
        rules, repeated = CaptionRules(), frozenset()
    found = [captions.refusal(caption, rules, repeated) for caption in row.captions]
    for caption, why in zip(row.captions, found, strict=True):
        if why is not None:
            yield reject(row, why[0], f"{why[1]}: {caption!r}"[:MAX_DETAIL])
    kept = [i for i, why in enumerate(found) if why is None]
    if len(kept) == len(found):
        yield row
    elif kept or row.labels_path is not None or row.referring or row.questions:
        ids = row.source.ids
        if len(ids) == len(row.captions):  # they are those of the captions
            row = replace(row, source=row.source.model_copy(update={"ids": tuple(ids[i] for i in kept)}))
        yield replace(row, captions=tuple(row.captions[i] for i in kept))
