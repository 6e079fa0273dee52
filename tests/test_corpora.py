"""Laws of the readers: a record becomes a row or a reject, and nothing in a corpus can run or escape."""

import io
import json
import os
import pickle
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.corpora import gathering, visual_genome
from pipelines.corpora.gathering import Gathered
from pipelines.corpora.readers import READERS, read, taxonomies
from pipelines.corpora.rows import CorpusError, Row
from pipelines.places import holder
from schemas.jobs import CorpusConfig
from schemas.masks import decode_rle
from schemas.records import Reject

SHARED = Path(__file__).resolve().parents[2] / "shared"
real_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="needs ../shared/data")
Document = dict[str, Any]


# ------------------------------------------------------------------------------------------ sound corpora


def coco_images() -> list[Document]:
    return [{"id": i, "file_name": f"{i}.jpg", "height": 8, "width": 8, "license": 1} for i in (1, 2)]


def panoptic() -> Document:
    segment = {"id": 65, "category_id": 7, "iscrowd": 0, "area": 16, "bbox": [0, 0, 4, 4]}
    stuff = {"id": 300, "category_id": 90, "iscrowd": 0, "area": 48, "bbox": [0, 0, 8, 8]}
    return {
        "licenses": [{"id": 1, "name": "CC BY"}],
        "images": coco_images(),
        "annotations": [
            {"image_id": i, "file_name": f"{i}.png", "segments_info": [dict(segment), dict(stuff)]}
            for i in (1, 2)
        ],
        "categories": [
            {"id": 90, "name": "grass", "isthing": 0},
            {"id": 7, "name": "dog", "isthing": 1},
        ],
    }


def instances() -> Document:
    polygon = [[1, 1, 5, 1, 5, 5, 1, 5]]
    return {
        "categories": [{"id": 7, "name": "dog"}],
        "images": coco_images(),
        "annotations": [
            {"id": 10 + i, "image_id": i, "category_id": 7, "segmentation": polygon} for i in (1, 2)
        ],
    }


def refs() -> list[Document]:
    return [
        {
            "ref_id": i,
            "ann_id": 10 + i,
            "image_id": i,
            "split": "train",
            "sentences": [{"sent": f"the dog {i}"}],
        }
        for i in (1, 2)
    ]


def grounding() -> Document:
    document = instances()
    for annotation in document["annotations"]:
        annotation |= {"ann_id": annotation["id"], "sentences": [{"raw": "The dog"}]}
    return document


def karpathy() -> Document:
    return {
        "images": [
            {
                "imgid": i,
                "cocoid": 100 + i,
                "filepath": "images",
                "filename": f"{i}.jpg",
                "split": "train",
                "sentences": [{"raw": "a dog", "sentid": 10 * i}, {"raw": "a pet", "sentid": 10 * i + 1}],
            }
            for i in (1, 2)
        ]
    }


def regions() -> list[Document]:
    box = {"x": 1, "y": 2, "width": 4, "height": 3}
    return [{"id": i, "regions": [{"region_id": i, "phrase": "a dog", **box}]} for i in (1, 2)]


def asked() -> list[Document]:
    asked = {"question": "What is it?", "answer": "A dog."}
    return [{"id": i, "qas": [{"qa_id": i, "image_id": i, **asked}]} for i in (1, 2)]


def tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def captions() -> Document:
    return {
        "images": coco_images(),
        "annotations": [
            {"id": 5, "image_id": 2, "caption": "a cat"},
            {"id": 6, "image_id": 1, "caption": " a\n dog "},
            {"id": 7, "image_id": 1, "caption": "the dog"},
        ],
    }


def questions() -> Document:
    asked = [{"question_id": i, "image_id": i, "question": f"what is {i}?"} for i in (1, 2)]
    return {"data_subtype": "train2014", "questions": asked}


def answers() -> Document:
    ten = [{"answer": "dog", "answer_id": i} for i in range(10)]
    entries = [{"question_id": i, "image_id": i, "question_type": "what is", "answers": ten} for i in (1, 2)]
    return {"annotations": entries}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a corpus of each format over the same two images."""
    folder = tmp_path / "corpus"
    for images in ("images", "labels", "pictures", "maps", "objects", "left/a", "fine/a"):
        (folder / images).mkdir(parents=True)
    for i in (1, 2):
        for name in (f"{i}.jpg", f"{i:012d}.jpg"):
            Image.new("RGB", (8, 8)).save(folder / "images" / name)
        Image.new("RGB", (8, 8)).save(folder / "labels" / f"{i}.png")
        Image.new("RGB", (8, 8)).save(folder / "pictures" / f"{i}.jpg")
        for maps in ("maps", "objects"):
            Image.new("L", (8, 8), i).save(folder / maps / f"{i}.png")
        Image.new("RGB", (8, 8)).save(folder / "left/a" / f"a_{i}_leftImg8bit.png")
        Image.new("L", (8, 8), 7).save(folder / "fine/a" / f"a_{i}_gtFine_instanceIds.png")
    for name, document in (
        ("panoptic.json", panoptic()),
        ("instances.json", instances()),
        ("captions.json", captions()),
        ("questions.json", questions()),
        ("answers.json", answers()),
        ("grounding.json", grounding()),
        ("karpathy.json", karpathy()),
        ("regions.json", regions()),
        ("asked.json", asked()),
    ):
        write(folder, name, document)
    (folder / "refs.p").write_bytes(pickle.dumps(refs(), protocol=2))
    (folder / "train.txt").write_bytes(b"1\n2\n")
    image = (folder / "images/1.jpg").read_bytes()
    tar(
        folder / "pairs.tar",
        [(f"{i}.{end}", data) for i in "12" for end, data in (("jpg", image), ("txt", b"x"))],
    )
    (folder / "captions.tsv").write_bytes(b"image\tcaption\n1.jpg\ta dog\n2.jpg\ta cat\n1.jpg\tthe dog\n")
    return folder


def write(root: Path, name: str, document: Any) -> None:
    (root / name).write_text(json.dumps(document), encoding="utf-8")


FILES: dict[str, dict[str, str]] = {
    "coco_panoptic": {"annotations": "panoptic.json", "labels": "labels"},
    "coco_instances": {"annotations": "instances.json"},
    "index_maps": {"images": "pictures", "labels": "maps", "classes": "coco_stuff"},
    "cityscapes": {"images": "left", "labels": "fine"},
    "voc": {"annotations": "train.txt", "labels": "maps", "instances": "objects"},
    "refcoco": {"annotations": "refs.p", "instances": "instances.json"},
    "grounding": {"annotations": "grounding.json"},
    "visual_genome": {"annotations": "regions.json", "questions": "asked.json"},
    "coco_captions": {"annotations": "captions.json"},
    "karpathy": {"annotations": "karpathy.json", "images": ""},
    "captions_table": {"annotations": "captions.tsv"},
    "webdataset": {"annotations": "pairs.tar", "images": ""},
    "vqa_v2": {"annotations": "answers.json", "questions": "questions.json"},
}
BY_FILE = [form for form in FILES if "annotations" in FILES[form] and form != "voc"]


def corpus(root: Path, form: str, **changed: Any) -> CorpusConfig:
    settings = {"name": "c", "format": form, "split": "train", "root": str(root), "images": "images"}
    return CorpusConfig.model_validate(settings | FILES[form] | changed)


def both(config: CorpusConfig) -> tuple[list[Row], list[Reject]]:
    items = list(read(config))
    return [i for i in items if isinstance(i, Row)], [i for i in items if isinstance(i, Reject)]


def reasons(config: CorpusConfig) -> dict[str, str]:
    return {reject.record: reject.reason for reject in both(config)[1]}


# ------------------------------------------------------------------------------------------ what is read


def test_every_format_has_a_reader() -> None:
    assert set(READERS) == {*FILES, "dataset"}, "tests/test_compose.py reads a dataset"


@pytest.mark.parametrize("form", FILES)
def test_a_sound_corpus_gives_a_row_an_image_and_no_reject(root: Path, form: str) -> None:
    rows, rejects = both(corpus(root, form))
    assert len(rows) == 2 and not rejects
    for row in rows:
        assert Path(holder(row.image_path)).is_absolute() and Path(holder(row.image_path)).is_file()
        assert (row.corpus, row.split, row.source.corpus) == ("c", "train", "c")
        assert all((root / file).is_file() for file in row.source.files)


def test_a_setting_that_a_format_does_not_use_is_an_error(root: Path) -> None:
    with pytest.raises(ValueError, match="format webdataset does not use classes, labels; it uses annot"):
        corpus(root, "webdataset", labels="maps", classes="coco")


def test_limit_counts_images(root: Path) -> None:
    for form in FILES:
        assert len(both(corpus(root, form, limit=1))[0]) == 1


def test_panoptic_keeps_ids_categories_and_licence(root: Path) -> None:
    row = both(corpus(root, "coco_panoptic"))[0][0]
    assert row.segments is not None and row.taxonomy == "c"
    assert [(s.id, s.category, s.isthing, s.area, s.bbox) for s in row.segments] == [
        (65, "dog", True, 16, (0, 0, 4, 4)),
        (300, "grass", False, 48, (0, 0, 8, 8)),
    ]
    assert (row.height, row.width, row.source.licence) == (8, 8, "CC BY")
    assert row.source.files == ("images/1.jpg", "labels/1.png")


def test_the_order_of_the_segments_of_an_image_is_nothing(root: Path) -> None:
    document = panoptic()
    straight = both(corpus(root, "coco_panoptic"))
    for annotation in document["annotations"]:
        annotation["segments_info"].reverse()
    write(root, "panoptic.json", document)
    assert both(corpus(root, "coco_panoptic")) == straight


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"name": "CC BY", "url": "https://x.org/by/2.0/"}, "CC BY https://x.org/by/2.0/"),
        ({"name": "CC BY", "url": None}, "CC BY"),
        ({"url": "https://x.org/by/2.0/"}, "https://x.org/by/2.0/"),
        ({}, "licence 1"),
        ({"name": ["CC BY"]}, "licence 1"),
    ],
)
def test_a_licence_of_coco_is_its_name_and_address(root: Path, described: Document, expected: str) -> None:
    write(root, "panoptic.json", panoptic() | {"licenses": [{"id": 1} | described]})
    assert {row.source.licence for row in both(corpus(root, "coco_panoptic"))[0]} == {expected}
    own = both(corpus(root, "coco_panoptic", licence="ours"))[0]
    assert {row.source.licence for row in own} == {"ours"}


@pytest.mark.parametrize("name", ["licence", "license"])
def test_tables_and_tars_may_state_the_licence_of_each_image(root: Path, name: str) -> None:
    image = (root / "images/1.jpg").read_bytes()
    said = [("1", "CC BY"), ("2", "CC BY-NC"), ("3", None)]
    members = [
        (f"{key}.{end}", data)
        for key, stated in said
        for end, data in (("jpg", image), ("json", json.dumps({"caption": "x", name: stated}).encode()))
    ]
    tar(root / "pairs.tar", members)
    table = pa.table({"image": [image] * 3, "caption": ["x"] * 3, name: [stated for _, stated in said]})
    pq.write_table(table, root / "t.parquet")
    lines = "".join(f"{1 + i % 2}.jpg\t{stated or ''}\tx\n" for i, (_, stated) in enumerate(said))
    (root / "t.tsv").write_text(f"image\t{name}\tcaption\n{lines}")
    for config in (
        corpus(root, "webdataset"),
        corpus(root, "captions_table", annotations="t.parquet"),
        corpus(root, "captions_table", annotations="t.tsv"),
    ):
        rows, rejects = both(config)
        assert [row.source.licence for row in rows] == ["CC BY", "CC BY-NC", ""] and not rejects
        (own,) = {row.source.licence for row in both(config.model_copy(update={"licence": "ours"}))[0]}
        assert own == "ours"


def test_the_taxonomy_keeps_the_order_of_the_file(root: Path) -> None:
    (found,) = taxonomies(corpus(root, "coco_panoptic"))
    assert found.names == ("grass", "dog") and found.things == {"dog"}
    assert taxonomies(corpus(root, "refcoco")) == ()


def test_refs_carry_their_mask_and_split(root: Path) -> None:
    row = both(corpus(root, "refcoco"))[0][0]
    (referring,) = row.referring
    assert referring.sentences == ("the dog 1",)
    assert decode_rle(referring.mask).sum() == 16
    other = corpus(root, "refcoco", split="val")
    with pytest.raises(CorpusError, match=r"no record of split 'val'; there are \['train'\]"):
        both(other)
    assert len(both(other.model_copy(update={"parts": ("train",)}))[0]) == 2


def test_captions_of_an_image_are_gathered_with_single_spaces(root: Path) -> None:
    assert [row.captions for row in both(corpus(root, "coco_captions"))[0]] == [
        ("a dog", "the dog"),
        ("a cat",),
    ]
    assert [row.captions for row in both(corpus(root, "captions_table"))[0]] == [
        ("a dog", "the dog"),
        ("a cat",),
    ]


def test_questions_meet_their_answers_by_id_whatever_the_order(root: Path) -> None:
    straight = both(corpus(root, "vqa_v2"))[0]
    write(root, "answers.json", {"annotations": answers()["annotations"][::-1]})
    assert both(corpus(root, "vqa_v2"))[0] == straight
    (question,) = straight[0].questions
    assert (question.question, question.kind) == ("what is 1?", "what is")
    assert question.answers == ("dog",) * 10


def test_vqa_finds_images_named_as_in_2014_and_as_in_2017(root: Path) -> None:
    plain = root / "images" / "000000000001.jpg"
    plain.rename(root / "images" / "COCO_train2014_000000000001.jpg")
    rows, rejects = both(corpus(root, "vqa_v2"))
    assert [Path(row.image_path).name for row in rows] == [
        "COCO_train2014_000000000001.jpg",
        "000000000002.jpg",
    ]
    assert not rejects


def test_a_tsv_of_windows_reads_the_same(root: Path) -> None:
    plain = both(corpus(root, "captions_table"))
    path = root / "captions.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert both(corpus(root, "captions_table")) == plain


# ------------------------------------------------------------------------------------------ whole files


@pytest.mark.parametrize("form", BY_FILE)
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no file"), (b"\x80\x05garbage", r"."), (b"", r"."), (b"[1, 2]", r"."), (b"{}", r".")],
)
def test_an_unusable_file_is_one_clear_error(
    root: Path, form: str, content: bytes | None, message: str
) -> None:
    path = root / FILES[form]["annotations"]
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CorpusError, match=message) as caught:
        both(corpus(root, form))
    assert str(path) in str(caught.value)


def test_the_error_of_a_file_says_what_to_do(root: Path) -> None:
    with pytest.raises(CorpusError, match=r"corpus 'c' \(refcoco, train\): set `instances` to a place below"):
        both(corpus(root, "refcoco", instances=""))
    with pytest.raises(CorpusError, match="expected a list 'images', found only .*right kind of file"):
        both(corpus(root, "coco_captions", annotations="questions.json"))
    with pytest.raises(CorpusError, match="name the columns 'image' and 'text' .*; it is"):
        both(corpus(root, "captions_table", caption_column="text"))
    with pytest.raises(CorpusError, match=r"a table ends in one of \.tsv, \.csv"):
        both(corpus(root, "captions_table", annotations="captions.json"))
    with pytest.raises(CorpusError, match="annotations '../x.json' leaves the corpus root .*move it below"):
        both(corpus(root, "coco_captions", annotations="../x.json"))


def test_an_empty_corpus_is_an_error(root: Path) -> None:
    write(root, "panoptic.json", panoptic() | {"images": [], "annotations": []})
    with pytest.raises(CorpusError, match=r"corpus 'c' \(coco_panoptic, train\) is empty"):
        both(corpus(root, "coco_panoptic"))


def test_a_bad_category_list_is_an_error(root: Path) -> None:
    dog = {"id": 1, "name": "dog", "isthing": 1}
    for categories in ([dog, dog | {"id": 2}], [], [{"id": 1, "name": "dog"}]):
        write(root, "panoptic.json", panoptic() | {"categories": categories})
        with pytest.raises(CorpusError, match=r"panoptic\.json"):
            taxonomies(corpus(root, "coco_panoptic"))


# ------------------------------------------------------------------------------------------ one record


Change = Callable[[Document], Any]


def broken(root: Path, form: str, file: str, document: Document, change: Change) -> dict[str, str]:
    """Rejects after one change to a sound document; the row of the other image must survive."""
    change(document)
    write(root, file, document)
    rows, rejects = both(corpus(root, form))
    assert len(rows) == 1 and len(rejects) == 1, rejects
    assert rejects[0].detail
    return {reject.record: reject.reason for reject in rejects}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["annotations"][0].pop("segments_info"), "record"),
        (lambda d: d["annotations"][0].update(segments_info="none"), "record"),
        (lambda d: d["annotations"][0]["segments_info"][0].update(id=0), "record"),
        (lambda d: d["annotations"][0]["segments_info"][0].update(id=2**24), "record"),
        (lambda d: d["annotations"][0]["segments_info"][0].update(area=float("nan")), "record"),
        (lambda d: d["annotations"][0]["segments_info"][0].update(bbox=[0, 0, 1e300, 1]), "record"),
        (lambda d: d["annotations"][0]["segments_info"][0].update(id=300), "segmentation"),
        (lambda d: d["annotations"][0]["segments_info"][0].update(category_id=8), "category"),
        (lambda d: d["annotations"][0].update(file_name="9.png"), "no-labels"),
        (lambda d: d["annotations"][0].update(file_name="../../etc/passwd"), "path"),
        (lambda d: d["images"][0].update(file_name="9.jpg"), "no-image"),
        (lambda d: d["images"][0].update(file_name="../../secret.jpg"), "path"),
        (lambda d: d["images"][0].update(file_name="/etc/passwd"), "path"),
        (lambda d: d["images"][0].update(file_name="a\0b.jpg"), "path"),
        (lambda d: d["images"][0].update(file_name="x" * 5000), "path"),
        (lambda d: d["images"][0].update(file_name="\ud800.jpg"), "record"),
        (lambda d: d["images"][0].update(height="tall"), "record"),
        (lambda d: d["images"][0].update(height=-8), "record"),
        (lambda d: d["images"].append(d["images"][0] | {"height": 9}), "duplicate-id"),
        (lambda d: d["annotations"].pop(0), "no-labels"),
    ],
)
def test_a_broken_panoptic_record_is_a_reject(root: Path, change: Change, reason: str) -> None:
    assert broken(root, "coco_panoptic", "panoptic.json", panoptic(), change) == {"image 1": reason}


@pytest.mark.parametrize("record", [None, 7, [], "x", {"image_id": [1]}, {"image_id": {"a": 1}}])
def test_a_record_of_another_type_is_a_reject(root: Path, record: Any) -> None:
    document = panoptic()
    document["annotations"].append(record)
    write(root, "panoptic.json", document)
    assert reasons(corpus(root, "coco_panoptic")) == {"image at position 2": "record"}


@pytest.mark.parametrize(("form", "file"), [("coco_panoptic", panoptic), ("coco_instances", instances)])
def test_an_image_record_that_no_annotation_can_mean_is_a_reject(
    root: Path, form: str, file: Callable[[], Document]
) -> None:
    """As an image that nobody annotated is one; formats in which such images do not count leave both out."""
    document = file()
    first = document["images"][0]
    extra = [{"file_name": "1.jpg"}, first | {"id": 1.5}, first | {"id": None}, "1.jpg", dict(first)]
    document["images"] += extra
    write(root, FILES[form]["annotations"], document)
    rows, rejects = both(corpus(root, form))
    assert len(rows) == 2
    assert [(reject.record, reject.reason) for reject in rejects] == [
        *((f"image at position {i}", "record") for i in (2, 3, 4, 5)),
        ("image 1", "duplicate-id"),
    ]
    write(root, "captions.json", captions() | {"images": document["images"]})
    assert not reasons(corpus(root, "coco_captions"))


@pytest.mark.parametrize("form", ["coco_panoptic", "coco_instances", "coco_captions", "grounding", "vqa_v2"])
def test_ids_written_as_whole_floats_find_their_records(root: Path, form: str) -> None:
    """As a table with an empty cell makes them."""
    sound = both(corpus(root, form))
    keys = ("id", "image_id", "category_id", "question_id")
    for name in (FILES[form][key] for key in ("annotations", "questions") if key in FILES[form]):
        document = json.loads((root / name).read_text())
        for record in (r for records in document.values() if isinstance(records, list) for r in records):
            record |= {key: float(record[key]) for key in keys if key in record}
        write(root, name, document)
    assert both(corpus(root, form)) == sound


def test_an_answer_without_an_id_is_a_reject(root: Path) -> None:
    document = answers()
    document["annotations"].append(document["annotations"][0] | {"question_id": [1]})
    write(root, "answers.json", document)
    assert reasons(corpus(root, "vqa_v2")) == {"answer at position 2": "record"}


def test_a_second_annotation_of_an_image_is_a_reject(root: Path) -> None:
    document = panoptic()
    document["annotations"].append(document["annotations"][0])
    write(root, "panoptic.json", document)
    assert reasons(corpus(root, "coco_panoptic")) == {"image 1": "duplicate-id"}
    assert len(both(corpus(root, "coco_panoptic"))[0]) == 2


def test_links_may_not_lead_out_of_the_root(root: Path) -> None:
    secret = root.parent / "secret.jpg"
    Image.new("RGB", (8, 8)).save(secret)
    (root / "images" / "1.jpg").unlink()
    (root / "images" / "1.jpg").symlink_to(secret)
    assert reasons(corpus(root, "coco_panoptic")) == {"image 1": "path"}
    (root / "images" / "2.jpg").unlink()
    (root / "images" / "2.jpg").symlink_to(root / "images" / "2.jpg")
    assert reasons(corpus(root, "coco_panoptic")).keys() == {"image 1", "image 2"}


def test_links_within_the_root_are_followed(root: Path) -> None:
    (root / "images" / "1.jpg").rename(root / "moved.jpg")
    (root / "images" / "1.jpg").symlink_to(root / "moved.jpg")
    rows, rejects = both(corpus(root, "coco_panoptic"))
    assert rows[0].source.files[0] == "moved.jpg" and not rejects


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["annotations"][0].update(caption=None), "record"),
        (lambda d: d["annotations"][0].update(caption=" \n"), "text"),
        (lambda d: d["annotations"][0].update(caption="a\0b"), "text"),
        (lambda d: d["annotations"][0].update(caption="a" * 20_000), "text"),
        (lambda d: d["annotations"][0].update(caption="\udcff"), "record"),
        (lambda d: d["annotations"][0].pop("image_id"), "record"),
    ],
)
def test_a_broken_caption_is_a_reject(root: Path, change: Change, reason: str) -> None:
    assert broken(root, "coco_captions", "captions.json", captions(), change) == {"caption 5": reason}


def test_an_empty_text_among_several_is_a_reject_and_the_others_stay(root: Path) -> None:
    """As in COCO's captions, where each is a record of its own."""
    document = karpathy()
    document["images"][0]["sentences"].insert(1, {"raw": " ", "sentid": 77})
    write(root, "karpathy.json", document)
    document = answers()
    document["annotations"][0]["answers"] = [{"answer": ""}, *document["annotations"][1]["answers"][1:]]
    write(root, "answers.json", document)
    document = grounding()
    document["annotations"][0]["sentences"].append({"raw": ""})
    write(root, "grounding.json", document)
    listed = refs()
    listed[0]["sentences"].append({"sent": "\n"})
    (root / "refs.p").write_bytes(pickle.dumps(listed))
    image = (root / "images/1.jpg").read_bytes()
    tar(root / "pairs.tar", [("1.jpg", image), ("1.txt", b""), ("1.json", b'{"caption": ["", "a dog"]}')])
    pq.write_table(pa.table({"image": ["1.jpg"], "caption": [["a dog", ""]]}), root / "t.parquet")
    for form, record, changed in (
        ("karpathy", "caption of image 1", {}),
        ("vqa_v2", "question 1", {}),
        ("grounding", "annotation 11", {}),
        ("refcoco", "ref 1", {}),
        ("webdataset", "caption of pairs.tar '1'", {}),
        ("captions_table", "caption of t.parquet row 0", {"annotations": "t.parquet"}),
    ):
        rows, rejects = both(corpus(root, form, **changed))
        assert [(reject.record, reject.reason) for reject in rejects] == [(record, "text")], form
        kept = [(*r.captions, *(s for x in r.referring for s in x.sentences)) for r in rows]
        assert kept[0] in {(), ("a dog", "a pet"), ("The dog",), ("the dog 1",), ("a dog",)}
        assert form != "karpathy" or rows[0].source.ids == ("10", "11")
        assert form != "vqa_v2" or rows[0].questions[0].answers == ("dog",) * 9
        assert len(rows) == (1 if form in ("webdataset", "captions_table") else 2)


def test_a_link_within_a_sample_of_a_tar_does_not_part_it(root: Path) -> None:
    image = (root / "images/1.jpg").read_bytes()
    with tarfile.open(root / "pairs.tar", "w") as file:
        for name, data in (("1.jpg", image), ("latest", b""), ("1.txt", b"a dog")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name == "latest":
                info.type, info.linkname = tarfile.SYMTYPE, "1.jpg"
            file.addfile(info, io.BytesIO(data))
    rows, rejects = both(corpus(root, "webdataset"))
    assert [row.captions for row in rows] == [("a dog",)]
    assert [(reject.record, reject.reason) for reject in rejects] == [("pairs.tar 'latest'", "no-image")]


def test_of_two_columns_of_licences_the_one_that_says_something_counts(root: Path) -> None:
    lines = ["image\tcaption\tlicence\tlicense", "1.jpg\ta dog\t\tCC BY", "2.jpg\ta cat\tCC0\tCC BY"]
    (root / "t.tsv").write_text("\n".join(lines) + "\n")
    rows, _ = both(corpus(root, "captions_table", annotations="t.tsv"))
    assert [row.source.licence for row in rows] == ["CC BY", "CC0"]
    named = pa.table([["1.jpg"], ["a dog"], ["CC0"], ["CC BY"]], ["image", "caption", "license", "license"])
    pq.write_table(named, root / "t.parquet")
    rows, _ = both(corpus(root, "captions_table", annotations="t.parquet"))
    assert [row.source.licence for row in rows] == [""], "which of the two is meant is not said"


def test_captions_of_an_unknown_image_are_one_reject(root: Path) -> None:
    document = captions()
    document["annotations"].append({"id": 9, "image_id": 77, "caption": "nowhere"})
    document["annotations"].append({"id": 5, "image_id": 1, "caption": "again"})
    write(root, "captions.json", document)
    assert reasons(corpus(root, "coco_captions")) == {"caption 5": "duplicate-id", "image 77": "no-image"}


def test_a_carriage_return_within_a_line_of_a_table_is_a_space(root: Path) -> None:
    for end, comma in (("tsv", b"\t"), ("csv", b",")):
        lines = [
            b"image,caption",
            b"1.jpg,a dog\r and a cat",
            b'2.jpg,"a\rcow"' if end == "csv" else b"2.jpg,a cow",
        ]
        (root / f"t.{end}").write_bytes(b"\r\n".join(lines).replace(b",", comma))
        rows, rejects = both(corpus(root, "captions_table", annotations=f"t.{end}"))
        assert [row.captions for row in rows] == [("a dog and a cat",), ("a cow",)] and not rejects


def test_a_list_of_names_may_begin_with_a_byte_order_mark(root: Path) -> None:
    plain = both(corpus(root, "voc"))
    (root / "train.txt").write_bytes(b"\xef\xbb\xbf1\r\n2\r\n")
    assert both(corpus(root, "voc")) == plain


def test_images_of_lvis_lie_where_their_url_says(root: Path) -> None:
    """LVIS v1 has no `file_name`, and images of two folders of COCO."""
    document = instances()
    for image in document["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/images/{image.pop('file_name')}"
    write(root, "instances.json", document)
    rows, rejects = both(corpus(root, "coco_instances", images=""))
    assert [row.source.files for row in rows] == [("images/1.jpg",), ("images/2.jpg",)] and not rejects
    document["images"][0]["coco_url"] = "http://example.org/../../../etc/passwd"
    document["images"][1].pop("coco_url")
    write(root, "instances.json", document)
    rejects = [*read(corpus(root, "coco_instances", images=""))]
    assert [r.reason for r in rejects if isinstance(r, Reject)] == ["no-image", "record"]


def test_broken_lines_of_a_tsv_are_rejects(root: Path) -> None:
    lines = [
        b"1.jpg\tgood",
        b"1.jpg\t\xff\xfe",
        b"1.jpg",
        b"1.jpg\ta\tb",
        b"9.jpg\tx",
        b"../../1.jpg\tx",
        b"2.jpg\t ",
        b"",
    ]
    (root / "captions.tsv").write_bytes(b"image\tcaption\n" + b"\n".join(lines))
    rows, rejects = both(corpus(root, "captions_table"))
    assert [row.captions for row in rows] == [("good",)]
    assert [(reject.record, reject.reason) for reject in rejects] == [
        ("captions.tsv line 3", "text"),
        ("captions.tsv line 4", "record"),
        ("captions.tsv line 5", "record"),
        ("captions.tsv line 6", "no-image"),
        ("captions.tsv line 7", "path"),
        ("captions.tsv line 8", "text"),
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["annotations"][0].update(answers=[]), "record"),
        (lambda d: d["annotations"][0].update(answers=[{"answer": 3}]), "record"),
        (lambda d: d["annotations"][0].update(answers=[{"answer": ""}]), "text"),
        (lambda d: d["annotations"][0].update(image_id=2), "record"),
        (lambda d: d["annotations"].append(d["annotations"][0] | {"question_type": "x"}), "duplicate-id"),
        (lambda d: d["annotations"].pop(0), "record"),
    ],
)
def test_a_broken_answer_is_a_reject(root: Path, change: Change, reason: str) -> None:
    assert broken(root, "vqa_v2", "answers.json", answers(), change) == {"question 1": reason}


@pytest.mark.parametrize(
    ("change", "record", "reason"),
    [
        (lambda d: d["questions"].pop(0), "question 1", "record"),
        (lambda d: d["questions"][0].update(question=" "), "question 1", "text"),
        (lambda d: d["questions"][0].update(image_id=-1), "question 1", "record"),
    ],
)
def test_a_broken_question_is_a_reject(root: Path, change: Change, record: str, reason: str) -> None:
    assert broken(root, "vqa_v2", "questions.json", questions(), change) == {record: reason}


def test_the_subset_of_vqa_cannot_lead_out_of_the_root(root: Path) -> None:
    write(root, "questions.json", questions() | {"data_subtype": "/../../../../../etc/"})
    (root / "images" / "000000000001.jpg").unlink()
    assert reasons(corpus(root, "vqa_v2")) == {"image 1": "path"}


# ------------------------------------------------------------------------------------------ refcoco


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        (None, "record"),
        ([], "segmentation"),
        ([[1, 1, 5, 5]], "segmentation"),
        ([[1, 1, 5, 1, 5, "x"]], "record"),
        ([[1, 1, 5, 1, 5, float("inf")]], "record"),
        ([[1, 1, 1e9, 1, 1e9, 1e9]], "segmentation"),
        ([[0, 0, 0, 0, 0, 0]], "segmentation"),
        ({"size": [9, 9], "counts": [0, 81]}, "segmentation"),
        ({"size": [8, 8], "counts": [64]}, "segmentation"),
        ({"size": [8, 8], "counts": [0, 60]}, "segmentation"),
        ({"size": [8, 8], "counts": [0, 2**31 - 1, 70]}, "segmentation"),
        ({"size": [8, 8], "counts": [-1, 65]}, "record"),
        ({"size": [8, 8], "counts": ""}, "segmentation"),
        ({"size": [8, 8], "counts": "0o"}, "segmentation"),
        ({"size": [8, 8], "counts": "~~"}, "segmentation"),
        ({"size": [8, 8], "counts": "é"}, "segmentation"),
        ({"size": [8, 8], "counts": "o" * 500_000}, "segmentation"),
    ],
)
def test_a_broken_mask_is_a_reject(root: Path, segmentation: Any, reason: str) -> None:
    def change(document: Document) -> None:
        document["annotations"][0]["segmentation"] = segmentation

    assert broken(root, "refcoco", "instances.json", instances(), change) == {"ref 1": reason}


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 1, 5, 1, 5, 5, 1, 5]],
        [[1, 1, 5, 1, 5, 5, 1, 5], [2, 2, 5, 2, 5, 5, 2, 5]],
        {"size": [8, 8], "counts": [9, 4, 4, 4, 4, 4, 4, 4, 27]},
        {"size": [8, 8], "counts": "94400000g0"},
    ],
)
def test_all_forms_of_a_mask_are_read(root: Path, segmentation: Any) -> None:
    document = instances()
    document["annotations"][0]["segmentation"] = segmentation
    write(root, "instances.json", document)
    rows, rejects = both(corpus(root, "refcoco"))
    assert not rejects
    mask = decode_rle(rows[0].referring[0].mask)
    assert mask.sum() == 16 and mask[1:5, 1:5].all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ann_id": 99}, "segmentation"),
        ({"ann_id": 12}, "record"),
        ({"image_id": 77}, "no-image"),
        ({"sentences": []}, "record"),
        ({"sentences": [{"sent": ""}]}, "text"),
        ({"sentences": [{"sent": 5}]}, "record"),
        ({"ref_id": 2}, "duplicate-id"),
        ({"split": None}, "record"),
    ],
)
def test_a_broken_ref_is_a_reject(root: Path, change: Document, reason: str) -> None:
    good, bad = refs()[1], refs()[0] | change
    (root / "refs.p").write_bytes(pickle.dumps([good, bad], protocol=2))
    rows, rejects = both(corpus(root, "refcoco"))
    assert len(rows) == 1 and [reject.reason for reject in rejects] == [reason]


class Executes:
    """A pickle of it calls os.mkdir with a path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_with_code_is_refused_unexecuted(root: Path, protocol: int) -> None:
    trap = root / "trapped"
    (root / "refs.p").write_bytes(pickle.dumps([*refs(), Executes(trap)], protocol=protocol))
    with pytest.raises(CorpusError, match="not a pickle of plain data.*nothing in a corpus may run"):
        both(corpus(root, "refcoco"))
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(refs(), protocol=2)[:-20],  # truncated
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo index of two billion: an empty list, not 16 GB
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x0f.",  # a frame of an exabyte
        b"(lp0\nPsecret\n.",  # a persistent id
        b"cos\nsystem\n(S'true'\ntR.",
    ],
)
def test_a_malformed_pickle_is_one_error(root: Path, content: bytes) -> None:
    (root / "refs.p").write_bytes(content)
    with pytest.raises(CorpusError, match=r"refs\.p"):
        both(corpus(root, "refcoco"))


def test_a_pickle_of_python_2_is_read(root: Path) -> None:
    content = pickle.dumps(refs(), protocol=2)
    # Python 2 wrote its texts as byte strings: SHORT_BINSTRING for BINUNICODE
    old = content.replace(b"X\x09\x00\x00\x00the dog", b"U\x09the dog")
    assert old != content
    (root / "refs.p").write_bytes(old)
    assert [row.referring[0].sentences for row in both(corpus(root, "refcoco"))[0]] == [
        ("the dog 1",),
        ("the dog 2",),
    ]
    (root / "refs.p").write_bytes(old.replace(b"the dog 2", b"the d\xffg 2"))
    assert reasons(corpus(root, "refcoco")) == {"ref 2": "record"}


# ------------------------------------------------------------------------------------------ real data


@real_data
@pytest.mark.parametrize(
    ("name", "labels", "images", "segments", "classes"),
    [
        ("panoptic_things_derived", "panoptic_things_derived", 105, None, 80),
        ("panoptic_official", "panoptic_official", 1, None, 133),
    ],
)
def test_real_panoptic(name: str, labels: str, images: int, segments: int | None, classes: int) -> None:
    config = CorpusConfig(
        name="coco",
        format="coco_panoptic",
        split="train",
        root=str(SHARED / "data/coco"),
        images="images",
        annotations=f"annotations/{name}.json",
        labels=labels,
    )
    rows, rejects = both(config)
    assert (len(rows), rejects) == (images, [])
    (found,) = taxonomies(config)
    assert len(found.names) == classes
    assert {s.category for row in rows for s in row.segments or ()} <= set(found.names)


@real_data
def test_real_microscopy() -> None:
    config = CorpusConfig(
        name="nuclei",
        format="coco_panoptic",
        split="train",
        root=str(SHARED / "data/nuclei"),
        images="images",
        annotations="panoptic.json",
        labels="panoptic",
    )
    rows, rejects = both(config)
    assert (len(rows), rejects) == (112, [])
    assert sum(len(row.segments or ()) for row in rows) == 3912


@real_data
def test_real_captions() -> None:
    config = CorpusConfig(
        name="coco",
        format="coco_captions",
        split="train",
        root=str(SHARED / "data/coco"),
        images="images",
        annotations="annotations/captions.json",
    )
    rows, rejects = both(config)
    assert (len(rows), rejects) == (124, [])
    assert all(len(row.captions) == 5 and row.source.licence for row in rows)


@real_data
def test_every_real_instance_can_be_referred_to(tmp_path: Path) -> None:
    """All official instances, crowds too, in the REFER layout."""
    coco = SHARED / "data/coco"
    shutil.copytree(coco / "images", tmp_path / "images")
    shutil.copy(coco / "annotations/instances.json", tmp_path)
    official = json.loads((tmp_path / "instances.json").read_text())["annotations"]
    made = [
        {
            "ref_id": i,
            "ann_id": a["id"],
            "image_id": a["image_id"],
            "split": "testA",
            "sentences": [{"sent": "it"}],
        }
        for i, a in enumerate(official)
    ]
    (tmp_path / "refs.p").write_bytes(pickle.dumps(made, protocol=2))
    rows, rejects = both(corpus(tmp_path, "refcoco", parts=("testA",)))
    assert not rejects and len(rows) == len({a["image_id"] for a in official})
    assert sum(len(row.referring) for row in rows) == len(official)


# ------------------------------------------------------------------------------------ memory of the readers


def test_what_is_said_of_an_image_is_brought_together_in_the_order_of_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = [("b.jpg", "two dogs"), ("a\udcff.jpg", "ein Käfer"), ("b.jpg", "", "a dog"), ("c.jpg", "x")]
    expected = [("b.jpg", ["two dogs", "", "a dog"]), ("a\udcff.jpg", ["ein Käfer"]), ("c.jpg", ["x"])]
    gathered, one_hash = Gathered(), Gathered()
    for record in said:
        gathered.add(*record)
    monkeypatch.setattr(gathering, "hash64", lambda data: 7)
    for record in said:
        one_hash.add(*record)
    assert list(gathered) == list(one_hash) == expected
    assert list(Gathered()) == []


def test_a_record_takes_its_bytes_and_little_more() -> None:
    """A Python text alone has 49 bytes beside its characters; a dictionary of lists took 500 a record."""
    gathered, count = Gathered(), 50_000
    tracemalloc.start()
    for i in range(count):
        gathered.add(f"{i:020}.jpg", "a photograph of a thing that stands in a field")
    assert sum(len(texts) for _, texts in gathered) == count
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < count * 180


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_a_list_is_read_in_pieces_as_it_is_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(visual_genome, "CHUNK", chunk)
    path = tmp_path / "list.json"
    for text in (' [ {"a": [1, {"b": "]}"}]} ,\n12345 , -1.5e3, "ä😀", null,[]] \n', "[]", " [ ] ", "[3]"):
        path.write_text(text, encoding="utf-8")
        assert list(visual_genome._elements(path)) == json.loads(text)
    for text in (
        '[{"a": 1}',
        '[{"a": 1} {"b": 2}]',
        '[{"a": 1},]',
        "[1] 2",
        '[{"a"',
        "",
        "[",
        '{"a": 1}',
        "[,]",
        "]",
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="character"):
            list(visual_genome._elements(path))
