"""What a build says of the version that it made: the dataset's card, from what its steps reported."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import get_args

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.catalog import Counts, DatasetCard
from pipelines.corpora.rows import PARTS
from pipelines.joining import JoinReport
from pipelines.reading import Harvest
from pipelines.screening import CHOSEN
from schemas.records import SCHEMA_VERSION, Split
from schemas.taxonomy import Taxonomy, contradiction

MAX_ANSWERS = 3129  # the answer list customary for VQA v2


class BuildError(ValueError):
    """A build that published nothing, and why."""


def make_card(
    dataset: str,
    code_version: str,
    harvests: Sequence[Harvest],
    joined: Sequence[JoinReport],
    rejects: pa.Table,
    num_kept: int,
) -> DatasetCard:
    """The card of a version that has no id yet; `harvests` in the order of the corpora."""
    return DatasetCard(
        dataset=dataset,
        version="",
        schema_version=SCHEMA_VERSION,
        code_version=code_version,
        sources=tuple(harvest.source for harvest in harvests),
        num_read=sum(harvest.num_rows + harvest.num_rejects for harvest in harvests),
        num_kept=num_kept,
        rejects=by_reason(rejects),
        counts={
            split: sum((report.counts[split] for report in joined), Counts()) for split in get_args(Split)
        },
        taxonomies=_seen(taxonomies(harvests), joined),
        answers=_answers(joined),
    )


def taxonomies(harvests: Sequence[Harvest]) -> dict[str, Taxonomy]:
    """Of all corpora, by name. Raises `BuildError` where two of them contradict each other."""
    found: dict[str, Taxonomy] = {}
    for taxonomy in (taxonomy for harvest in harvests for taxonomy in harvest.taxonomies):
        if found.setdefault(taxonomy.name, taxonomy) != taxonomy:
            raise BuildError(
                f"the splits of corpus {taxonomy.name!r} list different categories; give them two names"
            )
    if conflict := contradiction(found.items()):
        name, one, other = conflict
        raise BuildError(f"{name!r} is a thing in one of {one!r}, {other!r}, stuff in the other")
    return found


def by_reason(rejects: pa.Table) -> dict[str, int]:
    """How many, by reason."""
    counted = pc.value_counts(rejects["reason"]).to_pylist()
    return {row["values"]: row["counts"] for row in sorted(counted, key=lambda row: row["values"])}


def check_balance(num_read: int, num_kept: int, num_said: int, rejects: pa.Table, limit: float) -> None:
    """Every row read is kept or rejected, and not too many are faulty: of images, or of annotations.

    An image that loses one of its fifty regions is no lost image: what rows lose is compared with all that
    rows say. Of neither counts what the settings ask to reject, and what is refused for another image's sake.

    num_said    annotations of the rows that were read, beside those that are rejects themselves
    Raises `BuildError`.
    """
    assert num_read == num_kept + len(rejects), (num_read, num_kept, len(rejects))
    of_rows = pc.or_(
        pc.match_substring_regex(rejects["record"], f"^({'|'.join(PARTS)}) "),
        pc.starts_with(rejects["reason"], "caption-"),
    )
    lost, parts = rejects.filter(pc.invert(of_rows)), rejects.filter(of_rows)
    for what, found, total in (
        ("images", lost, num_read - len(parts)),
        ("annotations", parts, num_said + len(parts)),
    ):
        faulty = sum(count for reason, count in by_reason(found).items() if reason not in CHOSEN)
        if faulty > limit * total:
            share = f"{faulty} of {total} {what} were rejected, more than max_reject_share {limit:g}"
            raise BuildError(
                f"{share}; mend the corpora or raise it; nothing was published:{examples(rejects)}"
            )


def examples(rejects: pa.Table) -> str:
    """A line for each reason, the most frequent first, with the first of its rejects."""
    counts = by_reason(rejects)
    lines = []
    for reason in sorted(counts, key=lambda reason: -counts[reason]):
        first = rejects.slice(pc.index(rejects["reason"], reason).as_py(), 1).to_pylist()[0]
        where = f"{first['corpus']} {first['split']}, {first['record']}: {first['detail']}"
        lines.append(f"\n  {reason}: {counts[reason]}, e.g. {where}")
    return "".join(lines)


def _seen(known: Mapping[str, Taxonomy], joined: Sequence[JoinReport]) -> dict[str, Taxonomy]:
    """Mark the classes that have a training mask, in taxonomies that have any."""
    marked = {}
    for name, taxonomy in known.items():
        masked = {category for report in joined for category in report.masked.get(name, ())}
        seen = masked or set(taxonomy.names)
        categories = tuple(c.model_copy(update={"seen": c.name in seen}) for c in taxonomy.categories)
        marked[name] = Taxonomy(name=name, categories=categories)
    return marked


def _answers(joined: Sequence[JoinReport]) -> tuple[str, ...]:
    given: Counter[str] = Counter()
    for report in joined:
        given.update(report.answers)
    return tuple(sorted(given, key=lambda answer: (-given[answer], answer))[:MAX_ANSWERS])
