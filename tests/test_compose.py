"""A dataset version as a corpus: what is read back is what was built, whatever else is built beside it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.build import build
from pipelines.catalog import Catalog, DatasetVersion
from pipelines.corpora.readers import fingerprints, read, taxonomies
from pipelines.corpora.rows import CorpusError, Row
from pipelines.stream import read_samples
from schemas.jobs import BuildConfig, CorpusConfig
from schemas.records import Reject, Sample


def folder(version: DatasetVersion) -> Path:
    return version.shards_root.parent / "versions" / version.id


def corpus(root: Path, split: str = "train", **changed: object) -> CorpusConfig:
    base = {"name": "built", "format": "dataset", "split": split, "root": str(root)}
    return CorpusConfig.model_validate(base | changed)


def samples(version: DatasetVersion) -> Iterator[Sample]:
    for split, stream in (("train", "segmentation"), ("train", "image_text"), ("val", "segmentation")):
        yield from read_samples(version, split=split, stream=stream)  # type: ignore[arg-type]


@pytest.fixture
def linked(demo_dataset: DatasetVersion, tmp_path: Path) -> Path:
    """A version's folder that may be broken: tables of its own, the shards of the demo."""
    own = tmp_path / "datasets/demo/versions/x"
    own.mkdir(parents=True)
    for path in folder(demo_dataset).iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    (tmp_path / "datasets/demo/shards").mkdir()
    for path in demo_dataset.shards_root.glob("*.tar"):
        (tmp_path / "datasets/demo/shards" / path.name).hardlink_to(path)
    return own


def test_a_dataset_built_from_a_dataset_holds_the_same(demo_dataset: DatasetVersion, tmp_path: Path) -> None:
    both = [corpus(folder(demo_dataset), split) for split in ("train", "val")]
    catalog = Catalog(tmp_path, "again")
    report = build(both, BuildConfig(shard_samples=8), catalog)
    again = catalog.open()
    assert report.num_read == report.num_kept == report.num_samples == len(demo_dataset.samples)
    assert again.card.taxonomies == demo_dataset.card.taxonomies
    assert again.card.answers == demo_dataset.card.answers
    before = {s.meta.sha256: s for s in samples(demo_dataset)}
    after = {s.meta.sha256: s for s in samples(again)}
    assert before.keys() == after.keys() != set()
    for sha256, old in before.items():
        new = after[sha256]
        same = {"key": old.key, "sources": old.meta.sources}
        assert new.meta.model_copy(update=same) == old.meta
        assert new.meta.sources[0].corpus == "built" and new.meta.sources[1:] == old.meta.sources
        assert (new.labels is None) == (old.labels is None)
        assert new.labels is None or np.array_equal(new.labels, old.labels)


def test_the_parts_of_a_version_are_chosen(demo_dataset: DatasetVersion) -> None:
    root = folder(demo_dataset)
    train, val, all_ = (
        len(list(read(corpus(root, split, parts=parts))))
        for split, parts in (("train", ()), ("val", ()), ("train", ("train", "val")))
    )
    assert train and val and train + val == all_ == len(demo_dataset.samples)
    assert set(fingerprints(corpus(root))) == {"dataset.json"}
    assert {c.seen for t in taxonomies(corpus(root)) for c in t.categories} == {True}


def reasons(root: Path) -> list[str]:
    return sorted({item.reason for item in read(corpus(root)) if isinstance(item, Reject)})


def test_a_lost_or_cut_shard_costs_its_samples_alone(linked: Path) -> None:
    shards = sorted(linked.parent.parent.joinpath("shards").glob("train-*.tar"))
    shards[0].unlink()
    whole = shards[1].read_bytes()
    shards[1].unlink()
    shards[1].write_bytes(whole[:700])
    assert reasons(linked) == ["no-image", "record"]
    assert any(isinstance(item, Row) for item in read(corpus(linked)))


@pytest.mark.parametrize("name", ["../../../../etc/passwd", "/etc/passwd", "."])
def test_a_version_cannot_lead_out_of_its_shards(linked: Path, name: str) -> None:
    table = pq.read_table(linked / "samples.parquet")
    at = table.column_names.index("shard")
    pq.write_table(table.set_column(at, "shard", [[name] * len(table)]), linked / "samples.parquet")
    assert reasons(linked) == ["path"]


def test_a_folder_that_is_no_version_is_one_error(linked: Path) -> None:
    with pytest.raises(CorpusError, match="dataset.json"):
        list(read(corpus(linked.parent)))
    (linked / "samples.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorpusError, match="is the folder of a version"):
        list(read(corpus(linked)))
