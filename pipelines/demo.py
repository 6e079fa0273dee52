"""The synthetic world, written in the public formats of real corpora, so that the same readers serve both.

Panoptic scenes (COCO panoptic) with referring expressions about them (RefCOCO), and other scenes with
captions (TSV) and questions (VQA v2), each in a train and a val split. What a scene looks like is in
`demo_scenes`, what is said about it in `demo_texts`; here are the splits, the files and their layouts.
"""

import json
import logging
import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pipelines.demo_scenes import STUFF, THINGS, Array, Rng, Scene, Thing, make_scene
from pipelines.demo_texts import captions, phrases, questions
from schemas.jobs import CorpusConfig, DemoConfig
from schemas.masks import area_and_bbox, encode_rle, ids_to_rgb
from schemas.records import Split

log = logging.getLogger(__name__)

WORLD = 1  # raise it when the same settings give other files
LICENCE = "CC0-1.0"
MARKER = "demo.json"
FOLDERS = ("images", "annotations", "panoptic_train", "panoptic_val", "pairs")
SPLITS: tuple[Split, ...] = ("train", "val")

# Category ids with holes, as COCO's have.
CATEGORY_IDS = {name: 1 + i for i, name in enumerate(THINGS)} | {
    name: 101 + 2 * i for i, name in enumerate(STUFF)
}
Part = Literal["scenes", "pairs"]
# Image ids start here, and so does the randomness of a part: no two parts share a scene.
FIRST_ID: dict[tuple[Part, Split], int] = {
    ("scenes", "train"): 100_000_000,
    ("scenes", "val"): 200_000_000,
    ("pairs", "train"): 300_000_000,
    ("pairs", "val"): 400_000_000,
}


def write(config: DemoConfig, root: Path) -> tuple[CorpusConfig, ...]:
    """Write the world under `root` (`config.root` is not used) and return its corpora, all splits.

    A finished world of equal settings is kept; one of other settings, or an interrupted one, is written anew.
    The same settings give the same bytes. Raises `ValueError` where `root` holds anything else, or a class is
    unseen that is none.
    """
    if set(config.unseen) - set(THINGS) or set(THINGS) <= set(config.unseen):
        raise ValueError(f"demo.unseen must name some of {', '.join(THINGS)}; it is {list(config.unseen)}")
    settings = config.model_dump(mode="json", exclude={"root"}) | {"world": WORLD}
    if _claim(root, settings):
        log.info("the demo world in %s is up to date", root)
        return corpora(root)
    refs: list[dict[str, Any]] = []
    instances = _coco("RefCOCO instances") | {"categories": _categories(), "annotations": []}
    for split in SPLITS:
        _write_scenes(config, root, split, refs, instances)
        _write_pairs(config, root, split)
    _write_json(root / "annotations/instances.json", instances)
    # protocol 2, as the published files have
    (root / "annotations/refs(demo).p").write_bytes(pickle.dumps(refs, protocol=2))
    _write_json(root / MARKER, settings | {"finished": True})
    return corpora(root)


def corpora(root: Path) -> tuple[CorpusConfig, ...]:
    """The corpora of a world under `root`."""
    made = []
    for split in SPLITS:
        place: dict[str, Any] = {"split": split, "root": str(root), "licence": LICENCE}
        made += [
            CorpusConfig(
                name="demo-scenes",
                format="coco_panoptic",
                images=f"images/{split}",
                annotations=f"annotations/panoptic_{split}.json",
                labels=f"panoptic_{split}",
                **place,
            ),
            CorpusConfig(
                name="demo-refs",
                format="refcoco",
                images="images",
                annotations="annotations/refs(demo).p",
                instances="annotations/instances.json",
                **place,
            ),
            CorpusConfig(
                name="demo-captions",
                format="captions_table",
                images=f"pairs/{split}",
                annotations=f"annotations/captions_{split}.tsv",
                **place,
            ),
            CorpusConfig(
                name="demo-vqa",
                format="vqa_v2",
                images=f"pairs/{split}",
                annotations=f"annotations/vqa_{split}_annotations.json",
                questions=f"annotations/vqa_{split}_questions.json",
                **place,
            ),
        ]
    return tuple(made)


# ------------------------------------------------------------------------------------------------- the folder


def _claim(root: Path, settings: dict[str, Any]) -> bool:
    """True where the finished world is there; else make room for it, removing only what such a world has."""
    found = _marked(root / MARKER)
    if found == settings | {"finished": True}:
        return True
    if found is None and root.exists() and any(root.iterdir()):
        raise ValueError(f"{root} holds files that are not a demo world; choose an empty or a new folder")
    root.mkdir(parents=True, exist_ok=True)
    _write_json(root / MARKER, settings | {"finished": False})
    for folder in FOLDERS:
        shutil.rmtree(root / folder, ignore_errors=True)
    for folder in ("annotations", *(f"{f}/{s}" for f in ("images", "pairs") for s in SPLITS), *FOLDERS[2:4]):
        (root / folder).mkdir(parents=True)
    return False


def _marked(marker: Path) -> dict[str, Any] | None:
    """What a marker says; None where there is none, or a file of that name which we did not write."""
    try:
        document = json.loads(marker.read_bytes())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and "world" in document else None


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")


def _write_jpeg(path: Path, image: Array) -> None:
    # quality 95 without chroma subsampling: colours are half of what there is to learn
    Image.fromarray(image).save(path, quality=95, subsampling=0)


def _scenes(config: DemoConfig, part: Part, split: Split) -> Iterator[tuple[int, Rng, Scene]]:
    """Image id, a generator for its texts, the scene; each a function of seed, part, split and position."""
    seen = [name for name in THINGS if name not in config.unseen]
    classes = seen if (part, split) == ("scenes", "train") else THINGS
    total = getattr(config, f"{split}_{part}")
    start = reported = time.monotonic()
    for i in range(total):
        image_id = FIRST_ID[part, split] + i
        rng = np.random.default_rng([config.seed, image_id])
        yield image_id, rng, make_scene(rng, config.image_size, classes)
        now = time.monotonic()
        if now - reported > 2 or i == total - 1:
            rate, reported = (i + 1) / max(now - start, 1e-9), now
            left_s = (total - i - 1) / rate
            log.info("demo %s %s: %d of %d, %.0f/s, %.0f s left", split, part, i + 1, total, rate, left_s)


# --------------------------------------------------------------------------------------------- panoptic, refs


def _write_scenes(
    config: DemoConfig, root: Path, split: Split, refs: list[dict[str, Any]], instances: dict[str, Any]
) -> None:
    panoptic = _coco("panoptic") | {"categories": _categories(), "annotations": []}
    for image_id, rng, scene in _scenes(config, "scenes", split):
        name = f"{image_id:012d}"
        _write_jpeg(root / f"images/{split}/{name}.jpg", scene.image)
        ids, segments = _segments(scene)
        Image.fromarray(ids_to_rgb(ids)).save(root / f"panoptic_{split}/{name}.png")
        image = {"id": image_id, "width": config.image_size, "height": config.image_size, "license": 1}
        panoptic["images"].append(image | {"file_name": f"{name}.jpg"})
        panoptic["annotations"].append(
            {"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments}
        )
        instances["images"].append(image | {"file_name": f"{split}/{name}.jpg"})
        for position, thing in enumerate(scene.things):
            instance = _instance(thing, image_id, position)
            instances["annotations"].append(instance)
            refs.extend(_refs(rng, scene, thing, instance, split))
    _write_json(root / f"annotations/panoptic_{split}.json", panoptic)


def _segments(scene: Scene) -> tuple[Array, list[dict[str, Any]]]:
    """int32[S, S] of RGB ids, 0 void, and the `segments_info` of COCO panoptic."""
    ids = np.zeros(scene.image.shape[:2], np.int32)
    regions = [(t.name, t.crowd, t.mask) for t in scene.things] + [
        (g.name, False, g.mask) for g in scene.ground
    ]
    segments = []
    for position, (name, crowd, mask) in enumerate(regions, start=1):
        segment_id = 1_315_423 * position  # any distinct numbers whose three bytes are all in use
        ids[mask] = segment_id
        segments.append(
            {"id": segment_id, "category_id": CATEGORY_IDS[name], "iscrowd": int(crowd)} | _extent(mask)
        )
    return ids, segments


def _instance(thing: Thing, image_id: int, position: int) -> dict[str, Any]:
    rle = encode_rle(thing.mask)
    return {
        "id": image_id * 10 + position,
        "image_id": image_id,
        "category_id": CATEGORY_IDS[thing.name],
        "iscrowd": int(thing.crowd),
        "segmentation": {"size": list(rle.size), "counts": rle.counts},
    } | _extent(thing.mask)


def _extent(mask: Array) -> dict[str, Any]:
    area, bbox = area_and_bbox(mask)
    return {"area": area, "bbox": list(bbox)}


def _refs(
    rng: Rng, scene: Scene, thing: Thing, instance: dict[str, Any], split: Split
) -> list[dict[str, Any]]:
    """The entry of a thing in the REFER pickle: none where nothing unambiguous can be said of it."""
    texts = [phrase.text for phrase in phrases(rng, scene, thing)]
    if not texts:
        return []
    sentence_ids = [10 * instance["id"] + i for i in range(len(texts))]
    sentences = [
        {"sent_id": sent_id, "sent": text, "raw": text, "tokens": text.split()}
        for sent_id, text in zip(sentence_ids, texts, strict=True)
    ]
    return [
        {
            "ref_id": instance["id"],
            "ann_id": instance["id"],
            "category_id": instance["category_id"],
            "image_id": instance["image_id"],
            "split": split,
            "file_name": f"{instance['image_id']:012d}.jpg",
            "sent_ids": sentence_ids,
            "sentences": sentences,
        }
    ]


def _coco(what: str) -> dict[str, Any]:
    return {
        "info": {"description": f"synthetic demo world, {what}", "version": str(WORLD)},
        "licenses": [{"id": 1, "name": LICENCE, "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "images": [],
    }


def _categories() -> list[dict[str, Any]]:
    return [
        {
            "id": category_id,
            "name": name,
            "isthing": int(name in THINGS),
            "supercategory": name.split()[-1] if name in THINGS else "ground",
        }
        for name, category_id in CATEGORY_IDS.items()
    ]


# ---------------------------------------------------------------------------------------------- captions, VQA


def _write_pairs(config: DemoConfig, root: Path, split: Split) -> None:
    lines = ["image\tcaption"]
    asked: list[dict[str, Any]] = []
    answered: list[dict[str, Any]] = []
    for image_id, rng, scene in _scenes(config, "pairs", split):
        name = f"COCO_{split}_{image_id:012d}.jpg"
        _write_jpeg(root / f"pairs/{split}/{name}", scene.image)
        lines += [f"{name}\t{caption}" for caption in captions(rng, scene)]
        for position, question in enumerate(questions(rng, scene)):
            key = {"image_id": image_id, "question_id": image_id * 10 + position}
            asked.append(key | {"question": question.question})
            answered.append(
                key
                | {
                    "question_type": question.kind,
                    "answer_type": question.answer_type,
                    "multiple_choice_answer": question.answer,
                    "answers": [
                        {"answer": question.answer, "answer_confidence": "yes", "answer_id": i}
                        for i in range(1, 11)
                    ],
                }
            )
    (root / f"annotations/captions_{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    subset = {"data_type": "demo", "data_subtype": split, "task_type": "Open-Ended"}
    _write_json(root / f"annotations/vqa_{split}_questions.json", subset | {"questions": asked})
    _write_json(root / f"annotations/vqa_{split}_annotations.json", subset | {"annotations": answered})
