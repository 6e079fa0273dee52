"""A dataset version back to public forms, which other tools read, and which read again give the same samples.

    <folder>/images/<12 digits>.jpg                 as stored, named by number, as COCO does; also PNG
             annotations/panoptic_<taxonomy>_<split>.json    COCO panoptic, with panoptic_<taxonomy>_<split>/
             annotations/captions_<split>.json               COCO captions
             annotations/refs(<split>).p, instances_<split>.json    RefCOCO
             annotations/questions_<split>.json, answers_<split>.json    VQA v2
             rebuild.yaml                           the job file that reads all of it

Pixels, masks, classes and texts stay as they are; keys and sources are those of the new corpora.
"""

import hashlib
import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipelines.atomic import write_atomically
from pipelines.catalog import CatalogError, DatasetVersion
from pipelines.shards import parse
from pipelines.stream import decode_labels
from schemas.jobs import CorpusConfig
from schemas.masks import area_and_bbox, decode_rle, ids_to_rgb
from schemas.records import SampleMeta, Split
from schemas.taxonomy import Taxonomy


def export(version: DatasetVersion, folder: Path) -> tuple[CorpusConfig, ...]:
    """Write a version into a new folder; returns the corpora that read it.

    Raises `CatalogError` where the folder exists, or a sample is not what was written.
    """
    if folder.exists():
        raise CatalogError(f"{folder} exists; name a new folder")
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    splits: dict[Split, _Split] = {}
    for number, data in enumerate(_stored(version), 1):
        meta, files = parse(data)
        name = f"{number:012d}.jpg"  # VQA v2 finds an image so; decoders go by the bytes
        (folder / "images" / name).write_bytes(files["jpg"] if "jpg" in files else files["png"])
        empty = _Split(folder=folder, name=meta.split, taxonomies=version.card.taxonomies)
        splits.setdefault(meta.split, empty).add(number, name, meta, files)
    corpora = tuple(corpus for split in splits.values() for corpus in split.finish())
    job = {
        "kind": "rebuild",
        "dataset": f"{version.card.dataset}-again",
        "corpora": [corpus.model_dump(mode="json", exclude_defaults=True) for corpus in corpora],
    }
    write_atomically(folder / "rebuild.yaml", yaml.safe_dump(job, sort_keys=False).encode())
    return corpora


def _stored(version: DatasetVersion) -> Iterator[bytes]:
    """The byte range of every sample, in key order."""
    shards = version.shards()
    for start in range(0, len(version.samples), 10_000):
        for row in version.samples.slice(start, 10_000).to_pylist():
            data = shards.read(row["shard"], row["offset"], row["size_bytes"])
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                raise CatalogError(
                    f"sample {row['key']} of {row['shard']} is not what was written; "
                    "run: python -m jobs datasets verify"
                )
            yield data


@dataclass(kw_only=True)
class _Split:
    """What is gathered of one split: entries of the annotation files."""

    folder: Path
    name: Split
    taxonomies: dict[str, Taxonomy]
    panoptic: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    captions: dict[str, list[Any]] = field(default_factory=lambda: {"images": [], "annotations": []})
    instances: dict[str, list[Any]] = field(default_factory=lambda: {"images": [], "annotations": []})
    refs: list[Any] = field(default_factory=list)
    questions: list[Any] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)

    def add(self, number: int, file_name: str, meta: SampleMeta, files: Mapping[str, bytes]) -> None:
        image = {"id": number, "file_name": file_name, "height": meta.height, "width": meta.width}
        if meta.segments is not None and meta.taxonomy is not None:
            self._add_segments(image, meta, files["segments.png"])
        if meta.captions:
            self.captions["images"].append(image)
            self.captions["annotations"] += _numbered(
                self.captions["annotations"], ({"image_id": number, "caption": c} for c in meta.captions)
            )
        if meta.referring:
            self._add_referring(image, meta)
        for asked in meta.questions:
            named = {"question_id": len(self.questions) + 1, "image_id": number}
            self.questions.append(named | {"question": asked.question})
            answers = [{"answer": answer, "answer_id": i} for i, answer in enumerate(asked.answers, 1)]
            self.answers.append(named | {"question_type": asked.kind, "answers": answers})

    def _add_segments(self, image: dict[str, Any], meta: SampleMeta, labels: bytes) -> None:
        taxonomy = str(meta.taxonomy)
        known = self.panoptic.setdefault(taxonomy, {"images": [], "annotations": []})
        places = {name: i for i, name in enumerate(self.taxonomies[taxonomy].names, 1)}
        name = f"{image['id']:012d}.png"
        target = self.folder / f"panoptic_{taxonomy}_{self.name}" / name
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(ids_to_rgb(decode_labels(labels).astype(np.int32))).save(target)
        segments = [
            {
                "id": segment.id,
                "category_id": places[segment.category],
                "iscrowd": int(segment.iscrowd),
                "area": segment.area,
                "bbox": list(segment.bbox),
            }
            for segment in meta.segments or ()
        ]
        known["images"].append(image)
        known["annotations"].append({"image_id": image["id"], "file_name": name, "segments_info": segments})

    def _add_referring(self, image: dict[str, Any], meta: SampleMeta) -> None:
        self.instances["images"].append(image)
        for referring in meta.referring:
            number = len(self.refs) + 1
            area, bbox = area_and_bbox(decode_rle(referring.mask))
            self.instances["annotations"].append(
                {
                    "id": number,
                    "image_id": image["id"],
                    "category_id": 1,
                    "iscrowd": 0,
                    "area": area,
                    "bbox": list(bbox),
                    "segmentation": referring.mask.model_dump(mode="json"),
                }
            )
            self.refs.append(
                {
                    "ref_id": number,
                    "ann_id": number,
                    "image_id": image["id"],
                    "category_id": 1,
                    "split": self.name,
                    "sentences": [{"sent_id": i, "sent": s} for i, s in enumerate(referring.sentences)],
                }
            )

    def finish(self) -> list[CorpusConfig]:
        """Write the annotation files; the corpora that read them."""
        corpora = []
        for taxonomy, document in self.panoptic.items():
            categories = [
                {"id": i, "name": c.name, "isthing": int(c.isthing)}
                for i, c in enumerate(self.taxonomies[taxonomy].categories, 1)
            ]
            name = f"panoptic_{taxonomy}_{self.name}"
            self._write(f"{name}.json", document | {"categories": categories})
            corpora.append(
                self._corpus(taxonomy, format="coco_panoptic", annotations=f"{name}.json", labels=name)
            )
        if self.refs:
            self._write(f"instances_{self.name}.json", self.instances | {"categories": [_OBJECT]})
            # protocol 2, as the published files have
            path = self.folder / "annotations" / f"refs({self.name}).p"
            write_atomically(path, pickle.dumps(self.refs, protocol=2))
            instances = f"annotations/instances_{self.name}.json"
            corpora.append(
                self._corpus("phrases", format="refcoco", annotations=path.name, instances=instances)
            )
        if self.captions["annotations"]:
            name = f"captions_{self.name}.json"
            self._write(name, self.captions)
            corpora.append(self._corpus("captions", format="coco_captions", annotations=name))
        if self.questions:
            asked, answered = f"questions_{self.name}.json", f"answers_{self.name}.json"
            self._write(asked, {"data_subtype": f"{self.name}2014", "questions": self.questions})
            self._write(answered, {"annotations": self.answers})
            asked = f"annotations/{asked}"
            corpora.append(self._corpus("questions", format="vqa_v2", annotations=answered, questions=asked))
        return corpora

    def _corpus(self, name: str, *, annotations: str, **settings: Any) -> CorpusConfig:
        return CorpusConfig(
            name=name,
            split=self.name,
            root=str(self.folder),
            images="images",
            annotations=f"annotations/{annotations}",
            **settings,
        )

    def _write(self, name: str, document: Any) -> None:
        write_atomically(self.folder / "annotations" / name, json.dumps(document).encode())


_OBJECT = {"id": 1, "name": "object"}


def _numbered(before: list[Any], entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": i} | entry for i, entry in enumerate(entries, len(before) + 1)]
