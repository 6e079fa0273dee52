"""What each format means: layouts as distributed give the masks, classes and texts that their papers use."""

import hashlib
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from assembled import assemble
from PIL import Image

from pipelines import labels, places
from pipelines.corpora.readers import fingerprints, read, taxonomies
from pipelines.corpora.rows import CorpusError, Row
from schemas.jobs import CorpusConfig
from schemas.masks import decode_rle
from schemas.records import Reject, SampleMeta
from schemas.taxonomy import SHIPPED, ClassFile, class_file, shipped, shipped_file

SHARED = Path(__file__).resolve().parents[2] / "shared"
real_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs ../shared/data")
LIMIT = 10**8


def corpus(root: Path, form: str, **settings: Any) -> CorpusConfig:
    base = {"name": "c", "format": form, "split": "train", "root": str(root)}
    return CorpusConfig.model_validate(base | settings)


def both(config: CorpusConfig) -> tuple[list[Row], list[Reject]]:
    items = list(read(config))
    return [i for i in items if isinstance(i, Row)], [i for i in items if isinstance(i, Reject)]


def metas(config: CorpusConfig) -> list[SampleMeta]:
    rows, rejects = both(config)
    found = assemble(rows, LIMIT)
    assert not rejects and not found.rejects, (rejects, found.rejects)
    return [entry.meta for entry in found.entries]


def save(path: Path, pixels: Any, palette: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels))
    if palette:
        image.putpalette([(7 * i) % 256 for i in range(768)])
    image.save(path)
    return path


def photograph(path: Path, height: int, width: int, seed: int = 0) -> Path:
    return save(path, np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def u8(*rows: list[int]) -> Any:
    return np.array(rows, dtype=np.uint8)


def tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


# ------------------------------------------------------------------------------------------ class lists


@pytest.mark.parametrize(
    ("name", "things", "stuff", "unseen"),
    [
        ("coco", 80, 53, 0),
        ("coco_stuff", 80, 91, 15),
        ("ade150", 100, 50, 0),
        ("ade847", 0, 847, 0),
        ("cityscapes", 8, 11, 0),
        ("voc", 20, 0, 5),
    ],
)
def test_shipped_class_lists_have_their_published_sizes(
    name: str, things: int, stuff: int, unseen: int
) -> None:
    found = shipped(name)
    assert (len(found.things), len(found.names) - len(found.things)) == (things, stuff)
    assert len(found.names) - len(found.seen().names) == unseen
    assert all(name == name.strip() and name for name in found.names)


def test_every_shipped_list_is_counted() -> None:
    assert set(SHIPPED) == {"coco", "coco_stuff", "ade150", "ade847", "cityscapes", "voc"}


def test_the_unseen_classes_of_coco_stuff_are_those_of_the_protocol() -> None:
    """Values of the pixel maps as dingjiansw101/ZegFormer lists them."""
    listed = shipped_file("coco_stuff")
    ids = {name: i for i, name in (listed.things | listed.stuff).items()}
    assert sorted(ids[name] - 1 for name in listed.unseen) == [
        20, 24, 32, 33, 40, 56, 86, 99, 105, 123, 144, 147, 148, 168, 171,
    ]  # fmt: skip
    assert set(range(1, 184)) - {*ids.values(), *listed.void} == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}


def test_class_lists_of_the_same_corpus_agree() -> None:
    panoptic, stuff = shipped_file("coco"), shipped_file("coco_stuff")
    assert panoptic.things == stuff.things
    assert {i: n for i, n in panoptic.stuff.items() if i < 183} == {
        i: n for i, n in stuff.stuff.items() if i in panoptic.stuff
    }
    city = shipped_file("cityscapes")
    assert sorted([*city.things, *city.stuff, *city.void]) == list(range(1, 34))


@pytest.mark.parametrize(
    "content",
    ["[]", "things: {1: a}\nstuff: {1: b}", "things: {1: a}\nvoid: [1]", "unseen: [x]", "a: {", "\xff"],
)
def test_a_broken_class_list_is_one_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"own\.yaml"):
        class_file(path)


def test_the_order_of_a_class_list_is_that_of_its_ids() -> None:
    listed = ClassFile(things={5: "b", 9: "c"}, stuff={7: "a"})
    assert listed.taxonomy("t").names == ("b", "a", "c")


# ------------------------------------------------------------------------------------------ label maps


def semantic_root(tmp_path: Path, values: Any, name: str = "1") -> Path:
    height, width = np.shape(values)
    photograph(tmp_path / f"images/{name}.jpg", height, width)
    save(tmp_path / f"maps/{name}.png", values)
    return tmp_path


def test_coco_stuff_pixel_maps_become_their_classes(tmp_path: Path) -> None:
    root = semantic_root(tmp_path, u8([0, 0, 20], [255, 182, 181]), "deep/1")
    config = corpus(root, "index_maps", images="images", labels="maps", classes="coco_stuff")
    (meta,) = metas(config)
    assert [(s.category, s.area, s.bbox) for s in meta.segments or ()] == [
        ("person", 2, (0, 0, 2, 1)),
        ("cow", 1, (2, 0, 1, 1)),
        ("wood", 1, (2, 1, 1, 1)),
    ]
    assert not any(s.isthing for s in meta.segments or ()) and len(taxonomies(config)[0].names) == 171
    (meta,) = metas(config.model_copy(update={"seen_only": True}))
    assert [s.category for s in meta.segments or ()] == ["person", "wood"]


@pytest.mark.parametrize(
    ("classes", "values", "end", "found"),
    [
        ("ade150", u8([0, 1, 150]), "png", ["wall", "flag"]),
        ("ade847", np.array([[0, 845, 65535]], dtype=np.uint16), "tif", ["wall", "towel rail"]),
    ],
)
def test_both_forms_of_ade20k_become_their_classes(
    tmp_path: Path, classes: str, values: Any, end: str, found: list[str]
) -> None:
    photograph(tmp_path / "images/a.jpg", *values.shape)
    save(tmp_path / f"maps/a.{end}", values)
    (meta,) = metas(corpus(tmp_path, "index_maps", images="images", labels="maps", classes=classes))
    assert [s.category for s in meta.segments or ()] == found


def test_a_list_of_ones_own_serves_a_corpus_of_ones_own(tmp_path: Path) -> None:
    root = semantic_root(tmp_path, u8([0, 3, 4]))
    (root / "own.yaml").write_text("stuff: {3: field, 4: road}\n")
    config = corpus(root, "index_maps", images="images", labels="maps", classes="own.yaml")
    assert [s.category for s in metas(config)[0].segments or ()] == ["field", "road"]
    assert set(fingerprints(config)) == {"own.yaml"}
    with pytest.raises(CorpusError, match="set `classes` to one of"):
        both(config.model_copy(update={"classes": "nowhere"}))


def test_images_and_maps_without_the_other_are_rejects(tmp_path: Path) -> None:
    root = semantic_root(tmp_path, u8([3, 4]))
    photograph(root / "images/2.png", 1, 2)
    save(root / "maps/3.png", u8([3, 4]))
    _, rejects = both(corpus(root, "index_maps", images="images", labels="maps", classes="coco_stuff"))
    assert {r.record: r.reason for r in rejects} == {"image 2.png": "no-labels", "map 3.png": "no-image"}


def test_links_to_folders_are_rejects_and_unreadable_folders_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link out of the root, one within it and a loop: nothing behind them is read, and each is named."""
    root = semantic_root(tmp_path / "c", u8([1, 2]))
    config = corpus(root, "index_maps", images="images", labels="maps", classes="coco_stuff")
    elsewhere = semantic_root(tmp_path / "d", u8([1, 2]))
    (root / "images/out").symlink_to(elsewhere / "images")
    (root / "images/loop").symlink_to(root / "images")
    (root / "maps/deep").mkdir()
    (root / "maps/deep/within").symlink_to(root / "images")
    rows, rejects = both(config)
    assert len(rows) == 1 and {reject.reason for reject in rejects} == {"path"}
    assert [reject.record for reject in rejects] == ["images in loop", "images in out", "maps in deep/within"]

    def denied(path: str) -> Any:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.scandir", denied)
    with pytest.raises(CorpusError, match=r"maps: cannot be read .*Permission denied"):
        both(config)


@real_data
def test_a_real_pixel_map_has_the_classes_of_its_boxes(tmp_path: Path) -> None:
    coco = SHARED / "data/coco"
    for folder, source in (
        ("images", "images/000000017182.jpg"),
        ("maps", "stuff_pixelmaps/000000017182.png"),
    ):
        (tmp_path / folder).mkdir()
        shutil.copy(coco / source, tmp_path / folder)
    (meta,) = metas(corpus(tmp_path, "index_maps", images="images", labels="maps", classes="coco_stuff"))
    (listed,) = json.loads((coco / "annotations/stuff_boxes.json").read_text())["annotations"]
    expected = {box["category"] for box in listed["boxes"]} - {"stuff-other"}
    assert {s.category for s in meta.segments or ()} == expected


def test_cityscapes_folders_are_read_as_distributed(tmp_path: Path) -> None:
    """26001 and 26002 are cars, 26 a group of cars, 29001 a caravan, which is not evaluated."""
    ids = np.array([[7, 7, 26001, 26002], [0, 26, 29001, 24001]], dtype=np.uint16)
    frame = "ulm_000000_000019"
    photograph(tmp_path / f"leftImg8bit/train/ulm/{frame}_leftImg8bit.png", 2, 4)
    save(tmp_path / f"gtFine/train/ulm/{frame}_gtFine_instanceIds.png", ids)
    save(tmp_path / f"gtFine/train/ulm/{frame}_gtFine_labelIds.png", u8([7, 7, 26, 26], [0, 26, 29, 24]))
    config = corpus(tmp_path, "cityscapes", images="leftImg8bit/train", labels="gtFine/train")
    (meta,) = metas(config)
    assert meta.key == f"c-{frame}"
    assert [(s.category, s.isthing, s.iscrowd, s.area) for s in meta.segments or ()] == [
        ("road", False, False, 2),
        ("car", True, True, 1),
        ("person", True, False, 1),
        ("car", True, False, 1),
        ("car", True, False, 1),
    ]
    assert len(taxonomies(config)[0].names) == 19
    with pytest.raises(CorpusError, match="is it a folder such as gtFine/train"):
        both(config.model_copy(update={"labels": "leftImg8bit"}))


def voc_root(root: Path) -> CorpusConfig:
    photograph(root / "JPEGImages/2007_1.jpg", 2, 4)
    save(root / "SegmentationClass/2007_1.png", u8([0, 15, 15, 255], [1, 15, 15, 255]), palette=True)
    save(root / "SegmentationObject/2007_1.png", u8([0, 1, 2, 255], [3, 1, 2, 255]), palette=True)
    (root / "train.txt").write_text("2007_1\n\n")
    folders = {"images": "JPEGImages", "labels": "SegmentationClass", "instances": "SegmentationObject"}
    return corpus(root, "voc", annotations="train.txt", **folders)


def test_voc_pairs_of_class_and_object_become_instances(tmp_path: Path) -> None:
    config = voc_root(tmp_path)
    (meta,) = metas(config)
    assert [(s.category, s.isthing, s.area) for s in meta.segments or ()] == [
        ("aeroplane", True, 1),
        ("person", True, 2),
        ("person", True, 2),
    ]
    whole = config.model_copy(update={"background": True})
    assert [s.category for s in metas(whole)[0].segments or ()][0] == "background"
    assert taxonomies(whole)[0].names[:2] == ("background", "aeroplane")
    alone = config.model_copy(update={"instances": ""})
    assert [(s.category, s.isthing, s.area) for s in metas(alone)[0].segments or ()] == [
        ("aeroplane", False, 1),
        ("person", False, 4),
    ]


# ------------------------------------------------------------------------------------------ instances


def coco(root: Path, objects: list[dict[str, Any]]) -> CorpusConfig:
    photograph(root / "1.jpg", 8, 8)
    document = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 8, "width": 8}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [{"image_id": 1, "id": i} | one for i, one in enumerate(objects, 1)],
    }
    (root / "instances.json").write_text(json.dumps(document))
    return corpus(root, "coco_instances", annotations="instances.json")


def square(x: int, y: int, side: int) -> list[list[int]]:
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def test_smaller_objects_lie_on_top_and_crowds_below(tmp_path: Path) -> None:
    crowd = {"size": [8, 8], "counts": [0, 9, 55]}
    config = coco(
        tmp_path,
        [
            {"category_id": 1, "segmentation": square(1, 1, 2)},
            {"category_id": 2, "segmentation": square(0, 0, 4)},
            {"category_id": 2, "segmentation": crowd, "iscrowd": 1},
        ],
    )
    (meta,) = metas(config)
    assert [(s.category, s.iscrowd, s.area) for s in meta.segments or ()] == [
        ("dog", True, 4),  # the upper half of its first column, and its second one, lie below the square
        ("dog", False, 12),
        ("cat", False, 4),
    ]
    assert taxonomies(config)[0].things == {"cat", "dog"}


def test_a_hidden_object_is_a_reject_and_the_image_stays(tmp_path: Path) -> None:
    one = {"category_id": 1, "segmentation": square(1, 1, 2)}
    rows, rejects = both(coco(tmp_path, [one, one]))
    assert [len(row.segments or ()) for row in rows] == [1] and not assemble(rows, LIMIT).rejects
    assert [(r.record, r.reason) for r in rejects] == [("object 1", "segmentation")]


@real_data
def test_things_derived_from_real_instances_equal_those_derived_elsewhere() -> None:
    """As ../shared/data/README.md says of its own derivation: smaller in front, crowd behind."""
    settings = {"images": "images", "annotations": "annotations/instances.json", "limit": 40}
    rows, _ = both(corpus(SHARED / "data/coco", "coco_instances", **settings))
    derived = json.loads((SHARED / "data/coco/annotations/panoptic_things_derived.json").read_text())
    names = {c["id"]: c["name"] for c in derived["categories"]}
    expected = {
        str(a["image_id"]): sorted(
            (names[s["category_id"]], s["iscrowd"], s["area"]) for s in a["segments_info"]
        )
        for a in derived["annotations"]
    }
    found = {
        str(int(e.meta.key.removeprefix("c-"))): sorted(
            (s.category, int(s.iscrowd), s.area) for s in e.meta.segments or ()
        )
        for e in assemble(rows, LIMIT).entries
    }
    assert len(rows) == len(found) == 40
    assert found == {image: expected[image] for image in found}


@pytest.mark.parametrize(
    ("name", "parts"),
    [("refs(unc).p", ("testA", "testB")), ("refs(umd).p", ("test",)), ("refs(google).p", ("val",))],
)
def test_the_refer_layouts_are_read_by_their_own_splits(
    tmp_path: Path, name: str, parts: tuple[str, ...]
) -> None:
    """Field names as lichengunc/refer writes them; its file_name carries the object and is not used."""
    coco(tmp_path, [{"category_id": 1, "segmentation": square(1, 1, 2)} for _ in range(3)])
    refs = [
        {
            "ref_id": i,
            "ann_id": i,
            "image_id": 1,
            "category_id": 1,
            "split": split,
            "file_name": "COCO_train2014_000000000001_1.jpg",
            "sent_ids": [i],
            "sentences": [{"sent_id": i, "sent": f"the {split} cat", "raw": "The cat!", "tokens": ["the"]}],
        }
        for i, split in enumerate(("train", *parts), 1)
    ]
    (tmp_path / name).write_bytes(pickle.dumps(refs, protocol=2))
    settings = {"annotations": name, "instances": "instances.json", "parts": parts}
    (meta,) = metas(corpus(tmp_path, "refcoco", **settings))
    assert [r.sentences for r in meta.referring] == [(f"the {part} cat",) for part in parts]


def test_the_grounding_json_of_x_decoder_gives_raw_sentences(tmp_path: Path) -> None:
    coco(tmp_path, [])
    document = json.loads((tmp_path / "instances.json").read_text())
    sentences = [{"raw": "The Cat", "sent": "the cat"}, {"raw": "a cat."}]
    document["annotations"] = [
        {"image_id": 1, "ann_id": 5, "id": 9, "segmentation": square(1, 1, 2), "sentences": sentences}
    ]
    (tmp_path / "grounding.json").write_text(json.dumps(document))
    (meta,) = metas(corpus(tmp_path, "grounding", annotations="grounding.json"))
    (region,) = meta.referring
    assert region.sentences == ("The Cat", "a cat.") and decode_rle(region.mask).sum() == 4


# ------------------------------------------------------------------------------------------ texts


def genome(root: Path) -> CorpusConfig:
    photograph(root / "VG_100K_2/7.jpg", 6, 8)
    box = {"region_id": 1, "x": 6, "y": -1, "width": 9, "height": 3, "phrase": "a cat"}
    away = box | {"region_id": 2, "x": 8, "phrase": "a dog"}
    (root / "regions.json").write_text(json.dumps([{"id": 7, "regions": [box, away]}]))
    asked = {"qa_id": 3, "question": "Where is it?", "answer": "Here."}
    (root / "asked.json").write_text(json.dumps([{"image_id": 7, "qas": [asked]}]))
    return corpus(root, "visual_genome", annotations="regions.json", questions="asked.json")


def test_regions_of_visual_genome_are_captions_unless_boxes_are_asked_for(tmp_path: Path) -> None:
    config = genome(tmp_path)
    (meta,) = metas(config)
    assert meta.captions == ("a cat", "a dog") and not meta.referring
    assert [(q.question, q.answers, q.kind) for q in meta.questions] == [
        ("Where is it?", ("Here.",), "where")
    ]
    rows, rejects = both(config.model_copy(update={"regions": "referring"}))
    (region,) = rows[0].referring
    mask = decode_rle(region.mask)
    assert mask.shape == (6, 8) and mask.sum() == 4 and mask[:2, 6:].all() and not rows[0].captions
    assert [r.record for r in rejects] == ["region 2 of image 7"]


@pytest.mark.parametrize("box", [{"height": 0}, {"x": None}, {"width": 0.4}])
def test_a_box_is_looked_at_where_it_is_used(tmp_path: Path, box: dict[str, Any]) -> None:
    config = genome(tmp_path)
    document = json.loads((tmp_path / "regions.json").read_text())
    document[0]["regions"][0] |= box
    (tmp_path / "regions.json").write_text(json.dumps(document))
    (row,), rejects = both(config)
    assert row.captions == ("a cat", "a dog") and not rejects
    (row,), rejects = both(config.model_copy(update={"regions": "referring"}))
    assert not row.referring and [r.record[:8] for r in rejects] == ["region 1", "region 2"]


def test_karpathy_parts_are_chosen_and_joined(tmp_path: Path) -> None:
    images = []
    for i, part in enumerate(("train", "restval", "test")):
        photograph(tmp_path / f"val2014/{i}.jpg", 4, 4, seed=i)
        said = [{"raw": f"caption {i}", "sentid": i}]
        images.append(
            {"imgid": i, "filepath": "val2014", "filename": f"{i}.jpg", "split": part, "sentences": said}
        )
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    config = corpus(tmp_path, "karpathy", annotations="dataset_coco.json", parts=["train", "restval"])
    assert [meta.captions for meta in metas(config)] == [("caption 0",), ("caption 1",)]
    with pytest.raises(
        CorpusError, match=r"no record of split 'val'; there are \['restval', 'test', 'train'\]"
    ):
        both(config.model_copy(update={"split": "val", "parts": ()}))


def tables(root: Path) -> dict[str, Path]:
    """The same two pairs as paths in four kinds of table."""
    for i in "12":
        photograph(root / f"images/{i}.jpg", 4, 4, seed=int(i))
    rows = [("1.jpg", 'a "cat", sitting'), ("2.jpg", "a dog")]
    quoted = [f'{image},"{said}"'.replace('"cat"', '""cat""') for image, said in rows]
    (root / "t.tsv").write_text("image\tcaption\n" + "".join(f"{i}\t{said}\n" for i, said in rows))
    (root / "t.csv").write_text("image,caption\n" + "\n".join(quoted))
    table = pa.table({"image": [i for i, _ in rows], "caption": [said for _, said in rows]})
    pq.write_table(table, root / "t.parquet", row_group_size=1)
    with pa.ipc.new_file(root / "t.arrow", table.schema) as file:
        file.write_table(table)
    return {end: root / f"t.{end}" for end in ("tsv", "csv", "parquet", "arrow")}


def test_all_kinds_of_table_say_the_same(tmp_path: Path) -> None:
    found = {
        end: both(corpus(tmp_path, "captions_table", images="images", annotations=path.name))
        for end, path in tables(tmp_path).items()
    }
    (first, second), rejects = found["tsv"]
    assert first.captions == ('a "cat", sitting',) and second.captions == ("a dog",) and not rejects
    assert all(rows == found["tsv"] for rows in found.values())


@pytest.mark.parametrize("end", ["parquet", "arrow"])
@pytest.mark.parametrize("nested", [False, True])
def test_image_bytes_in_a_table_are_read_at_their_place(tmp_path: Path, end: str, nested: bool) -> None:
    """Nested: Hugging Face's `image: {bytes, path}`; plain with a list of captions: the ViLT layout."""
    data = [photograph(tmp_path / f"{i}.png", 4, 4, seed=i).read_bytes() for i in range(3)]
    images = [{"bytes": one, "path": ""} for one in data] if nested else data
    said = [["a", "b"], ["c"], ["d"]]
    table = pa.table({"image": images, "caption": said, "image_id": [30, 31, 32]})
    (tmp_path / "in").mkdir()
    if end == "parquet":
        pq.write_table(table, tmp_path / "in/x.parquet", row_group_size=2)
    else:
        with pa.ipc.new_file(tmp_path / "in/x.arrow", table.schema) as file:
            file.write_table(table, max_chunksize=2)
    rows, rejects = both(corpus(tmp_path, "captions_table", annotations=f"in/*.{end}"))
    assert not rejects and [row.captions for row in rows] == [("a", "b"), ("c",), ("d",)]
    assert [places.read(row.image_path) for row in rows] == data
    assert [row.image_id for row in rows] == [f"in/x.{end}#{i}" for i in (30, 31, 32)]
    hashes = {e.meta.sha256 for e in assemble(rows, LIMIT).entries}
    assert hashes == {hashlib.sha256(one).hexdigest() for one in data}


def test_the_output_of_img2dataset_is_read_in_place(tmp_path: Path) -> None:
    data = [photograph(tmp_path / f"{i}.jpg", 4, 4, seed=i).read_bytes() for i in range(2)]
    for i, one in enumerate(data):
        meta = {"caption": f"image {i}", "key": f"00{i}", "status": "success", "width": 4}
        members = [
            (f"00{i}.jpg", one),
            (f"00{i}.json", json.dumps(meta).encode()),
            (f"00{i}.txt", b"image %d" % i),
        ]
        tar(tmp_path / f"0000{i}.tar", members)
    config = corpus(tmp_path, "webdataset", annotations="*.tar")
    rows, rejects = both(config)
    assert not rejects and [row.captions for row in rows] == [("image 0",), ("image 1",)]
    assert [places.read(row.image_path) for row in rows] == data
    assert set(fingerprints(config).values()) == {f"{(tmp_path / '00000.tar').stat().st_size} bytes"}


def test_any_webdataset_is_read_by_its_own_rule_of_keys(tmp_path: Path) -> None:
    image = photograph(tmp_path / "x.png", 4, 4).read_bytes()
    said = json.dumps({"text": ["one", "two"]}).encode()
    tar(
        tmp_path / "x.tar",
        [("a.b/c.left.png", image), ("a.b/c.json", b"{}"), ("a.b/d.png", image), ("a.b/d.JSON", said)],
    )
    rows, rejects = both(corpus(tmp_path, "webdataset", annotations="x.tar", caption_column="text"))
    assert [(r.record, r.reason) for r in rejects] == [("x.tar 'a.b/c'", "no-image")]
    assert [(row.image_id, row.captions) for row in rows] == [("x.tar#a.b/d", ("one", "two"))]


def test_a_name_with_brackets_is_a_name_and_a_pattern_a_pattern(tmp_path: Path) -> None:
    tables(tmp_path)
    (tmp_path / "t.tsv").rename(tmp_path / "t[1].tsv")
    config = corpus(tmp_path, "captions_table", images="images", annotations="t[1].tsv")
    assert len(both(config)[0]) == 2 and set(fingerprints(config)) == {"t[1].tsv"}
    many = config.model_copy(update={"annotations": "t*.[ct]sv"})
    assert [len(row.captions) for row in both(many)[0]] == [2, 2]
    assert set(fingerprints(many)) == {"t.csv", "t[1].tsv"}
    for outside in ("../*.tsv", "/etc/*.tsv"):
        with pytest.raises(CorpusError, match="leaves its root"):
            both(config.model_copy(update={"annotations": outside}))


def test_label_maps_are_read_from_containers_too(tmp_path: Path) -> None:
    data = save(tmp_path / "map.png", u8([0, 1, 2])).read_bytes()
    tar(tmp_path / "x.tar", [("map.png", data)])
    place = labels.label_place("index", places.member(str(tmp_path / "x.tar"), 512, len(data)))
    assert labels.read(place, LIMIT).runs.pixels.tolist() == [[0, 1, 2]]
