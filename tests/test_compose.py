"""A dataset version as a corpus: what is read back is what was built, whatever else is built beside it."""

import hashlib
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.build import build
from pipelines.catalog import Catalog, DatasetVersion
from pipelines.corpora.readers import fingerprints, read, taxonomies
from pipelines.corpora.rows import CorpusError, Row
from pipelines.curate import files_of, judge
from pipelines.inspection import inspect
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


def test_a_dataset_built_from_a_dataset_holds_the_same(
    demo_dataset: DatasetVersion, tmp_path: Path, ray_session: None
) -> None:
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


@pytest.mark.parametrize("name", ["../../../../etc/passwd", "/etc/passwd", ".", "a\0b"])
def test_a_version_cannot_lead_out_of_its_shards(linked: Path, name: str) -> None:
    set_column(linked, "shard", lambda column: pa.array([name] * len(column)))
    assert reasons(linked) == ["path"]


def test_a_folder_that_is_no_version_is_one_error(linked: Path) -> None:
    with pytest.raises(CorpusError, match="dataset.json"):
        list(read(corpus(linked.parent)))
    (linked / "samples.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorpusError, match="is the folder of a version"):
        list(read(corpus(linked)))


def change(linked: Path, edit: Callable[[bytes], bytes], *, rehash: bool) -> int:
    """Edit the bytes of the training samples, of unchanged length; with `rehash` as a forger would."""
    table = pq.read_table(linked / "samples.parquet")
    records, changed = table.to_pylist(), 0
    for record in (r for r in records if r["split"] == "train"):
        path = linked.parent.parent / "shards" / record["shard"]
        whole, stop = path.read_bytes(), record["offset"] + record["size_bytes"]
        edited = edit(whole[record["offset"] : stop])
        if edited != whole[record["offset"] : stop]:
            path.unlink()  # it is the demo's, too
            path.write_bytes(whole[: record["offset"]] + edited + whole[stop:])
            record["sha256"] = hashlib.sha256(edited).hexdigest()
            changed += 1
    if rehash:
        pq.write_table(pa.Table.from_pylist(records, schema=table.schema), linked / "samples.parquet")
    return changed


@pytest.mark.parametrize("start", [b'"captions":["', b"\xff\xda", b"IDAT"])
def test_a_flipped_bit_is_a_reject_and_never_carried_over(linked: Path, start: bytes) -> None:
    def flip(data: bytes) -> bytes:
        at = data.find(start) + len(start) + 2
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] if start in data else data

    changed = change(linked, flip, rehash=False)
    found = [item for item in read(corpus(linked)) if isinstance(item, Reject)]
    assert len(found) == changed > 0
    assert {item.reason for item in found} == {"record"} and "datasets verify" in found[0].detail


def blanked(match: re.Match[bytes]) -> bytes:
    return match[1] + b" " * len(match[2])


def looked_at(item: Row | Reject) -> Any:
    """A row with the facts of its files, as the check of a build sees it."""
    if isinstance(item, Reject):
        return item
    return judge(item, {wanted: inspect(*wanted, 10**6)[0] for wanted in files_of(item)})


@pytest.mark.parametrize(
    ("pattern", "by", "reason"),
    [
        (rb'("counts":")[^"]*', lambda m: m[1] + b"1" * (len(m[0]) - len(m[1])), "segmentation"),
        (rb'("counts":")[^"]*', lambda m: m[1] + b"o" * (len(m[0]) - len(m[1])), "segmentation"),
        (rb'("sentences":\[")([^"]*)', blanked, "text"),
        (rb'("captions":\[")([^"]*)', blanked, "text"),
        (rb'("category":")[^"]', rb"\1#", "category"),
        (rb'("id":)1', rb"\g<1>7", "segmentation"),
        (rb'("height":)6', rb"\1-", "record"),
    ],
)
def test_a_forged_description_is_distrusted_as_any_other(
    linked: Path, pattern: bytes, by: Any, reason: str
) -> None:
    changed = change(linked, lambda data: re.sub(pattern, by, data, count=1), rehash=True)
    found = [item for item in map(looked_at, read(corpus(linked))) if isinstance(item, Reject)]
    assert len(found) == changed > 0 and {item.reason for item in found} == {reason}


def set_column(linked: Path, name: str, values: Any) -> None:
    table = pq.read_table(linked / "samples.parquet")
    at = table.column_names.index(name)
    pq.write_table(table.set_column(at, name, [values(table[name])]), linked / "samples.parquet")


@pytest.mark.parametrize("name", ["key", "split", "shard", "offset", "size_bytes", "sha256"])
def test_a_table_of_samples_with_holes_is_rejects_and_of_other_types_one_error(
    linked: Path, name: str
) -> None:
    set_column(linked, name, lambda column: pa.nulls(len(column), column.type))
    found = list(read(corpus(linked, parts=("train", "val"))))
    assert {item.reason for item in found if isinstance(item, Reject)} == {"record"} and f" {name}" in str(
        found
    )
    assert not any(isinstance(item, Row) for item in found)
    set_column(linked, name, lambda column: pa.array([1.5] * len(column)))
    with pytest.raises(CorpusError, match=f"'{name}' is double.*is the folder of a version"):
        list(read(corpus(linked)))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("offset", -512, "record"),
        ("offset", 2**62, "record"),
        ("size_bytes", -1, "record"),
        ("shard", "x" * 5000, "no-image"),
    ],
)
def test_impossible_places_are_rejects(linked: Path, name: str, value: Any, reason: str) -> None:
    set_column(linked, name, lambda column: pa.array([value] * len(column)))
    assert reasons(linked) == [reason]


def test_a_shard_that_comes_back_is_read_by_the_next_build(linked: Path, tmp_path: Path) -> None:
    shard = next(linked.parent.parent.joinpath("shards").glob("train-image_text-*.tar"))
    whole = shard.read_bytes()
    shard.unlink()
    catalog, config = Catalog(tmp_path / "store", "again"), BuildConfig(num_workers=1, max_reject_share=1)
    first = build([corpus(linked)], config, catalog)
    assert first.rejects == {"no-image": first.num_read - first.num_kept} != {"no-image": 0}
    assert not build([corpus(linked)], config, catalog).new
    shard.write_bytes(whole)
    second = build([corpus(linked)], config, catalog)
    assert second.new and second.rejects == {} and second.num_kept == first.num_read


# ------------------------------------------------------------------------------------------- ids of a list


def photograph(seed: int) -> bytes:
    sink = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((64, 48)).save(sink, "JPEG")
    return sink.getvalue()


def tar(path: Path, images: dict[str, int]) -> None:
    """A pair for each key; the image by its seed."""
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as file:
        for key, seed in images.items():
            for name, data in ((f"{key}.jpg", photograph(seed)), (f"{key}.txt", b"a dog")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def pairs(root: Path, split: str = "train", **changed: object) -> CorpusConfig:
    base = {"format": "webdataset", "annotations": "*.tar", "image_ids": "coco"}
    return corpus(root, split, **(base | changed))


def numbers(config: CorpusConfig) -> list[str]:
    return [item.image_number for item in read(config) if isinstance(item, Row)]


IDS = {
    "000000000042": "coco 42",
    "COCO_val2014_000000391895": "coco 391895",
    "deep/7": "coco 7",
    "2007_000032": "coco 2007_000032",
    "aachen_000000_000019": "coco aachen_000000_000019",
    "9" * 60: "coco " + "9" * 60,
}


def test_the_number_of_an_image_is_its_own_in_any_container(tmp_path: Path) -> None:
    tar(tmp_path / "tars/00000.tar", dict.fromkeys(IDS, 1))
    assert numbers(pairs(tmp_path / "tars")) == list(IDS.values())
    assert set(numbers(pairs(tmp_path / "tars", image_ids=""))) == {""}
    (tmp_path / "tables/images").mkdir(parents=True)
    for name in ("40.v1", "COCO_train2014_000000000040"):
        (tmp_path / f"tables/images/{name}.jpg").write_bytes(photograph(1))
    lines = "images/40.v1.jpg\ta dog\nimages/COCO_train2014_000000000040.jpg\ta dog\n"
    (tmp_path / "tables/t.tsv").write_text("image\tcaption\n" + lines)
    table = {"format": "captions_table", "image_ids": "coco"}
    assert numbers(corpus(tmp_path / "tables", annotations="t.tsv", **table)) == ["coco 40.v1", "coco 40"]
    ids = pa.array([391895, 42])
    for shown, expected in ((ids, ["coco 391895", "coco 42"]), (None, ["", ""])):
        rows = pa.table({"image": [photograph(1)] * 2, "caption": [["a dog"]] * 2})
        rows = rows if shown is None else rows.append_column("image_id", shown)
        with pa.ipc.new_file(tmp_path / "tables/coco_caption_karpathy_train_0.arrow", rows.schema) as file:
            file.write_table(rows)
        assert numbers(corpus(tmp_path / "tables", annotations="*.arrow", **table)) == expected


def test_a_version_knows_the_numbers_of_what_it_was_made_of(tmp_path: Path) -> None:
    """Also a version of a version."""
    tar(tmp_path / "tars/00000.tar", {key: seed for seed, key in enumerate(IDS)})
    config, expected = pairs(tmp_path / "tars"), sorted(IDS.values())
    for store in ("one", "two"):
        catalog = Catalog(tmp_path / store, "d")
        build([config], BuildConfig(num_workers=1), catalog)
        config = corpus(folder(catalog.open()), image_ids="coco")
        assert sorted(numbers(config)) == expected


def test_of_a_sample_of_two_corpora_the_first_one_numbers_it(tmp_path: Path) -> None:
    """Another corpus has another name for the same picture."""
    tar(tmp_path / "coco/00000.tar", {"000000397133": 5})
    tar(tmp_path / "other/00000.tar", {"2": 5})
    both = [pairs(tmp_path / name, name=name) for name in ("coco", "other")]
    catalog = Catalog(tmp_path / "store", "d")
    assert build(both, BuildConfig(num_workers=1), catalog).num_samples == 1
    assert numbers(corpus(folder(catalog.open()), image_ids="coco")) == ["coco 397133"]


def test_a_frame_of_cityscapes_keeps_its_id_in_a_version(tmp_path: Path) -> None:
    for folder_, end, pixels in (("left", "leftImg8bit", 99), ("fine", "gtFine_instanceIds", 7)):
        path = tmp_path / f"city/{folder_}/aachen/aachen_000000_000019_{end}.png"
        path.parent.mkdir(parents=True)
        Image.new("L", (8, 8), pixels).save(path)
    settings = {"format": "cityscapes", "images": "left", "labels": "fine", "image_ids": "city"}
    raw, catalog = corpus(tmp_path / "city", **settings), Catalog(tmp_path / "store", "d")
    build([raw], BuildConfig(num_workers=1), catalog)
    made = corpus(folder(catalog.open()), image_ids="city")
    assert numbers(raw) == numbers(made) == ["city aachen_000000_000019"]


def test_leaks_by_number_are_found_in_tars_and_clean_images_stay(tmp_path: Path) -> None:
    tar(tmp_path / "train/00000.tar", {f"{i:012d}": i for i in range(40, 46)})
    tar(tmp_path / "val/00000.tar", {"000000000045": 100, "000000000046": 101})
    catalog = Catalog(tmp_path / "store", "d")
    splits = [pairs(tmp_path / "train"), pairs(tmp_path / "val", "val", name="held")]
    report = build(splits, BuildConfig(num_workers=1, max_reject_share=1), catalog)
    assert report.rejects == {"leakage": 1} and report.num_kept == 7
    (gone,) = catalog.open().rejects.to_pylist()
    assert gone["record"] == "image 00000.tar#000000000045" and "has its number" in gone["detail"]
