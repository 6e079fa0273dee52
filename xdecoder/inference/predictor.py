"""A trained model as a user meets it: pictures and words in, typed answers out, each of which can draw
itself.

    predictor = Predictor.load(folder)
    predictor.panoptic(["street.jpg"], classes=["car", "road"])[0].draw().save("out.png")

Pictures may be paths, PIL images or arrays uint8[H, W, 3]; answers have the picture's own size. Class lists
are open: without one, the classes of the training are used.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from schemas.masks import Array, area_and_bbox, encode_rle
from schemas.tasks import TASKS, Task
from schemas.taxonomy import Category, Taxonomy
from xdecoder.inference import draw, generate, postprocess
from xdecoder.inference.postprocess import Frame, Instances, PanopticMap
from xdecoder.inference.zeroshot import ZeroShot
from xdecoder.model.decoder import Pixels
from xdecoder.model.files import ModelCard, load_model
from xdecoder.model.xdecoder import XDecoder, columns
from xdecoder.training.augment import PAD_VALUE
from xdecoder.training.losses import answer_logits, pack

Picture = str | Path | Image.Image | Array


@dataclass(frozen=True, kw_only=True)
class PanopticResult:
    image: Array
    map: PanopticMap
    names: tuple[str, ...]

    def draw(self) -> Image.Image:
        names = {s.id: self.names[s.label] for s in self.map.segments}
        return draw.draw_panoptic(self.image, self.map.labels, names)

    def to_json(self) -> dict[str, Any]:
        return {
            "segments": [
                {
                    "category": self.names[s.label],
                    "score": round(s.score, 4),
                    "isthing": s.isthing,
                    **_mask_json(self.map.labels == s.id),
                }
                for s in self.map.segments
            ]
        }


@dataclass(frozen=True, kw_only=True)
class SemanticResult:
    """labels int64[H, W], index into `names`."""

    image: Array
    labels: Array
    names: tuple[str, ...]

    def draw(self) -> Image.Image:
        return draw.draw_semantic(self.image, self.labels, self.names)

    def to_json(self) -> dict[str, Any]:
        present = np.unique(self.labels).tolist()
        return {"classes": [{"category": self.names[i], **_mask_json(self.labels == i)} for i in present]}


@dataclass(frozen=True, kw_only=True)
class InstanceResult:
    image: Array
    instances: Instances
    names: tuple[str, ...]

    def draw(self) -> Image.Image:
        """Only those with a score of at least one half."""
        sure = self.instances.scores >= 0.5
        names = [self.names[i] for i in self.instances.labels[sure]]
        return draw.draw_instances(
            self.image, self.instances.masks[sure], names, self.instances.scores[sure].tolist()
        )

    def to_json(self) -> dict[str, Any]:
        rows = zip(self.instances.labels, self.instances.scores, self.instances.masks, strict=True)
        return {
            "instances": [
                {"category": self.names[i], "score": round(float(s), 4), **_mask_json(m)} for i, s, m in rows
            ]
        }


@dataclass(frozen=True, kw_only=True)
class ReferringResult:
    """masks bool[P, H, W], one for each phrase."""

    image: Array
    phrases: tuple[str, ...]
    masks: Array

    def draw(self) -> Image.Image:
        return draw.draw_masks(self.image, self.masks, self.phrases)

    def to_json(self) -> dict[str, Any]:
        rows = zip(self.phrases, self.masks, strict=True)
        return {"phrases": [{"phrase": phrase, **_mask_json(mask)} for phrase, mask in rows]}


@dataclass(frozen=True, kw_only=True)
class TextResult:
    """A caption, or a question and its answer (`score` is the answer's probability in the list)."""

    image: Array
    text: str
    question: str | None = None
    score: float | None = None

    def draw(self) -> Image.Image:
        return draw.draw_text(self.image, [t for t in (self.question, self.text) if t])

    def to_json(self) -> dict[str, Any]:
        if self.question is None:
            return {"caption": self.text}
        return {"question": self.question, "answer": self.text, "score": round(self.score or 0.0, 4)}


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """scores float32[I, N]: how well each picture fits each text, -1 to 1."""

    texts: tuple[str, ...]
    scores: Array

    def to_json(self) -> dict[str, Any]:
        return {
            "texts": [
                {
                    "text": text,
                    "ranking": np.argsort(-column).tolist(),
                    "scores": np.round(column, 4).tolist(),
                }
                for text, column in zip(self.texts, self.scores.T, strict=True)
            ]
        }


class Predictor:
    """Answers the seven tasks with one model. Methods take any number of pictures and work in batches."""

    def __init__(self, model: XDecoder, card: ModelCard, *, device: str = "cpu", batch: int = 16) -> None:
        self.model, self.card, self.device, self.batch = model.eval(), card, device, batch
        self.vocabulary = card.vocabulary
        with torch.no_grad():
            self._tasks = model.text(model.task_ids).sentence

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "Predictor":
        """A model that `training.checkpoint.export` wrote. Raises `ValueError` where the folder holds
        none.
        """
        model, card = load_model(Path(folder), device)
        return cls(model, card, device=device)

    # --------------------------------------------------------------------------------------------
    # segmentation

    def panoptic(
        self,
        images: Sequence[Picture],
        classes: Sequence[str] | Taxonomy | None = None,
        *,
        object_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        task: Task = "panoptic",
    ) -> list[PanopticResult]:
        """Every pixel to at most one segment. `task` is the token that is fed (the others serve
        experiments).
        """
        taxonomy = self._taxonomy(classes)
        things = torch.tensor([c.isthing for c in taxonomy.categories])
        return [
            PanopticResult(
                image=image,
                names=taxonomy.names,
                map=postprocess.panoptic(
                    probs,
                    masks,
                    frame,
                    things=things,
                    object_threshold=object_threshold,
                    overlap_threshold=overlap_threshold,
                ),
            )
            for image, probs, masks, frame in self._segments(images, taxonomy, task)
        ]

    def semantic(
        self,
        images: Sequence[Picture],
        classes: Sequence[str] | Taxonomy | None = None,
        *,
        zeroshot: ZeroShot | None = None,
    ) -> list[SemanticResult]:
        """Every pixel to one class. `zeroshot` tells classes that the training did not know (ZegFormer)."""
        taxonomy = self._taxonomy(classes)
        handicap = None if zeroshot is None else zeroshot.handicap(self._seen(taxonomy))
        return [
            SemanticResult(
                image=image,
                labels=postprocess.semantic(probs, masks, frame, handicap),
                names=taxonomy.names,
            )
            for image, probs, masks, frame in self._segments(images, taxonomy, "semantic", zeroshot)
        ]

    def instance(
        self, images: Sequence[Picture], classes: Sequence[str] | Taxonomy | None = None, *, top_k: int = 100
    ) -> list[InstanceResult]:
        """Things, each with a mask and a score, best first."""
        taxonomy = self._taxonomy(classes)
        things = torch.tensor([c.isthing for c in taxonomy.categories])
        return [
            InstanceResult(
                image=image,
                names=taxonomy.names,
                instances=postprocess.instances(probs, masks, frame, things=things, top_k=top_k),
            )
            for image, probs, masks, frame in self._segments(images, taxonomy, "instance")
        ]

    def refer(self, image: Picture, phrases: Sequence[str]) -> ReferringResult:
        """The region that each phrase means; no phrase changes what another one finds.

        Raises `ValueError` without a phrase.
        """
        if not phrases:
            raise ValueError("referring needs at least one phrase")
        pixels, arrays, frames = next(self._fitted([image]))
        masks = []
        with torch.no_grad():
            for start in range(0, len(phrases), self.batch):
                some = phrases[start : start + self.batch]
                text, sentences = pack(self.model.encode_texts(some), [1] * len(some))
                where = torch.zeros(len(some), dtype=torch.int64, device=self.device)
                final = self.model.ask(
                    pixels, "referring", where, self._task("referring", len(some)), text
                ).final
                nearest = self.model.similarity(final.semantic, sentences)  # float[phrases, O, 1]
                logits = self.model.masks(final, pixels, where)
                masks += [
                    postprocess.referring(n, m, frames[0]) for n, m in zip(nearest, logits, strict=True)
                ]
        return ReferringResult(image=arrays[0], phrases=tuple(phrases), masks=np.concatenate(masks))

    # -------------------------------------------------------------------------------------------- image and
    # text

    def retrieve(self, images: Sequence[Picture], texts: Sequence[str]) -> RetrievalResult:
        """How well pictures fit texts: the mean of the decoder's and the backbone's cosine (X-Decoder, 2.4).

        Raises `ValueError` without a text.
        """
        if not texts:
            raise ValueError("retrieval needs at least one text")
        rows = []
        with torch.no_grad():
            sentences = F.normalize(self.model.encode_texts(texts).sentence, dim=-1)
            for pixels, arrays in self._squared(images):
                where = torch.arange(len(arrays), device=self.device)
                final = self.model.ask(
                    pixels, "segmentation", where, self._task("retrieval", len(arrays))
                ).final
                both = (final.image, self.model.embed_pooled(pixels))
                rows.append(torch.stack([F.normalize(x, dim=-1) @ sentences.T for x in both]).mean(0).cpu())
        return RetrievalResult(texts=tuple(texts), scores=torch.cat(rows).numpy())

    def caption(self, images: Sequence[Picture], *, max_tokens: int = 50) -> list[TextResult]:
        """A sentence about each picture."""
        results = []
        for pixels, arrays in self._squared(images):
            where = torch.arange(len(arrays), device=self.device)
            task = self._task("captioning", len(arrays))
            texts = generate.greedy(self.model, pixels, where, task, max_tokens)
            results += [TextResult(image=a, text=t) for a, t in zip(arrays, texts, strict=True)]
        return results

    def answer(
        self, image: Picture, questions: Sequence[str], answers: Sequence[str] | None = None
    ) -> list[TextResult]:
        """The answer to each question, chosen from a list (by default that of the training).

        Raises `ValueError` without a question, and where there is no list to choose from.
        """
        if not questions:
            raise ValueError("answering needs at least one question")
        listed = tuple(answers) if answers is not None else self.vocabulary.answers
        if not listed:
            raise ValueError(
                "no answers to choose from: the model was trained without questions; give a list"
            )
        with torch.no_grad():
            pixels, arrays = next(self._squared([image]))
            text = self.model.encode_texts(questions)
            where = torch.zeros(len(questions), dtype=torch.int64, device=self.device)
            final = self.model.ask(pixels, "vqa", where, self._task("vqa", len(questions)), text).final
            probs = answer_logits(self.model, final, text, self.model.encode_texts(listed).sentence).softmax(
                -1
            )
        best = [(int(p.argmax()), float(p.max())) for p in probs]
        return [
            TextResult(image=arrays[0], text=listed[i], question=q, score=s)
            for q, (i, s) in zip(questions, best, strict=True)
        ]

    # -------------------------------------------------------------------------------------------- inside

    def _taxonomy(self, classes: Sequence[str] | Taxonomy | None) -> Taxonomy:
        """A class list as a taxonomy; names the training did not know count as things."""
        if classes is None:
            return self.vocabulary.taxonomy
        if isinstance(classes, Taxonomy):
            return classes
        known = {c.name: c for c in self.vocabulary.taxonomy.categories}
        categories = tuple(known.get(name, Category(name=name, isthing=True)) for name in classes)
        return Taxonomy(name="prediction", categories=categories)

    def _task(self, task: Task, rows: int) -> Tensor:
        return self._tasks[TASKS.index(task)].expand(rows, -1)

    @torch.no_grad()
    def _segments(
        self, images: Sequence[Picture], taxonomy: Taxonomy, task: Task, zeroshot: ZeroShot | None = None
    ) -> Iterator[tuple[Array, Tensor, Tensor, Frame]]:
        """For each picture: itself, class probabilities [O, K + 1], mask logits [O, h, w], and its frame."""
        classes = self._classes(taxonomy.names)
        for pixels, arrays, frames in self._fitted(images):
            where = torch.arange(len(arrays), device=self.device)
            final = self.model.ask(pixels, "segmentation", where, self._task(task, len(arrays))).final
            probs, masks = self.model.pairs(final, pixels, where, classes)
            if zeroshot is not None and self.model.config.output == "masks":
                logits = self.model.class_logits(final.semantic, classes)
                views = [_tensor(a, f.valid).to(self.device) for a, f in zip(arrays, frames, strict=True)]
                probs = torch.stack(
                    [
                        zeroshot.probabilities(*one, taxonomy.names, self._seen(taxonomy))
                        for one in zip(logits, views, masks, frames, strict=True)
                    ]
                )
            yield from zip(arrays, probs, masks, frames, strict=True)

    def _seen(self, taxonomy: Taxonomy) -> Tensor:
        """bool[K], the classes that had masks in the training."""
        known = set(self.vocabulary.taxonomy.names)
        return torch.tensor([name in known for name in taxonomy.names], device=self.device)

    def _classes(self, names: Sequence[str]) -> Tensor:
        """What `XDecoder.class_logits` takes for these classes."""
        if self.model.config.classes:
            return columns(self.vocabulary.taxonomy.names, names).to(self.device)
        texts = self.model.class_texts(names)
        return texts.embed(self.model.text(texts.ids.to(self.device)).sentence)

    @torch.no_grad()
    def _fitted(self, images: Sequence[Picture]) -> Iterator[tuple[Pixels, list[Array], list[Frame]]]:
        """Pictures with their long side at the training's size, padded to a common multiple of the stride."""
        for arrays in self._batches(images):
            side, stride = self.card.image_size, self.model.stride
            sizes = [_fit(a.shape[:2], side) for a in arrays]
            padded = tuple(-(-max(s[i] for s in sizes) // stride) * stride for i in (0, 1))
            canvas = torch.full((len(arrays), 3, *padded), PAD_VALUE / 255)
            padding = torch.ones(len(arrays), *padded, dtype=torch.bool)
            for i, (array, (height, width)) in enumerate(zip(arrays, sizes, strict=True)):
                canvas[i, :, :height, :width] = _tensor(array, (height, width))
                padding[i, :height, :width] = False
            frames = [
                Frame(padded=(padded[0], padded[1]), valid=s, original=(a.shape[0], a.shape[1]))
                for a, s in zip(arrays, sizes, strict=True)
            ]
            yield self.model.encode(canvas.to(self.device), padding.to(self.device)), arrays, frames

    @torch.no_grad()
    def _squared(self, images: Sequence[Picture]) -> Iterator[tuple[Pixels, list[Array]]]:
        """Pictures squeezed to the square that image-text training uses."""
        side = self.card.image_text_size
        for arrays in self._batches(images):
            canvas = torch.stack([_tensor(a, (side, side)) for a in arrays]).to(self.device)
            padding = torch.zeros(len(arrays), side, side, dtype=torch.bool, device=self.device)
            yield self.model.encode(canvas, padding), arrays

    def _batches(self, images: Sequence[Picture]) -> Iterator[list[Array]]:
        if not len(images):
            raise ValueError("no pictures given")
        for start in range(0, len(images), self.batch):
            yield [read_picture(image) for image in images[start : start + self.batch]]


def read_picture(picture: Picture) -> Array:
    """Anything a user calls a picture -> uint8[H, W, 3].

    Raises `ValueError` where a file is missing or no picture, or an array has another shape or type.
    """
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
            raise ValueError(f"a picture is uint8[H, W, 3], this is {picture.dtype}{list(picture.shape)}")
        return picture
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    try:
        with Image.open(picture) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise ValueError(f"{picture}: no such picture") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{picture}: cannot be read as a picture ({error})") from None


def _fit(size: tuple[int, ...], side: int) -> tuple[int, int]:
    fit = side / max(size)
    return max(1, round(size[0] * fit)), max(1, round(size[1] * fit))


def _tensor(array: Array, size: tuple[int, int]) -> Tensor:
    image = Image.fromarray(array)
    if array.shape[:2] != size:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _mask_json(mask: Array) -> dict[str, Any]:
    area, bbox = area_and_bbox(mask)
    rle = encode_rle(mask)
    return {"area": area, "bbox": list(bbox), "mask": {"size": list(rle.size), "counts": rle.counts}}
