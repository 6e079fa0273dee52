"""A trained model as a user meets it: pictures and words in, typed answers out, each of which can draw
itself.

    predictor = Predictor.load("models/street")  # or s3://bucket/models/street
    predictor.panoptic(["street.jpg"], classes=["car", "road"])[0].draw().save("out.png")

Pictures may be paths, PIL images or arrays uint8[H, W, 3]; answers have the picture's own size. Class lists
are open: without one, the classes of the training are used.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from pyarrow import ArrowException, fs
from torch import Tensor
from torch.nn import functional as F

from schemas.masks import Array, area_and_bbox, encode_rle
from schemas.pictures import to_rgb
from schemas.tasks import TASKS, Task
from schemas.taxonomy import Category, Taxonomy
from xdecoder.inference import draw, generate, postprocess
from xdecoder.inference.generate import GREEDY, Search
from xdecoder.inference.postprocess import Frame, Instances, PanopticMap
from xdecoder.inference.zeroshot import ZeroShot
from xdecoder.model.decoder import Pixels, Prediction
from xdecoder.model.files import CARD, WEIGHTS, ModelCard, load_model
from xdecoder.model.layers import product, unit
from xdecoder.model.xdecoder import XDecoder, columns
from xdecoder.prompts import END
from xdecoder.training.augment import PAD_VALUE
from xdecoder.training.losses import answer_logits, pack

Picture = str | Path | Image.Image | Array
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PanopticResult:
    image: Array
    map: PanopticMap
    names: tuple[str, ...]

    def draw(self) -> Image.Image:
        names = {s.id: self.names[s.label] for s in self.map.segments}
        return draw.draw_panoptic(self.image, self.map.labels, names, self.names)

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
            self.image, self.instances.masks[sure], names, self.names, self.instances.scores[sure].tolist()
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
    """masks bool[P, H, W], one for each phrase; scores float32[P], how well each fits, -1 to 1."""

    image: Array
    phrases: tuple[str, ...]
    masks: Array
    scores: Array

    def draw(self) -> Image.Image:
        return draw.draw_masks(self.image, self.masks, self.phrases)

    def to_json(self) -> dict[str, Any]:
        rows = zip(self.phrases, self.scores, self.masks, strict=True)
        return {"phrases": [{"phrase": p, "score": round(float(s), 4), **_mask_json(m)} for p, s, m in rows]}


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
    """scores float32[I, N]: how well each of I pictures fits each of N texts, -1 to 1."""

    images: tuple[Array, ...]
    texts: tuple[str, ...]
    scores: Array

    def draw(self) -> Image.Image:
        """The best picture for each text, one below the other."""
        best = zip(self.texts, self.scores.argmax(0), self.scores.max(0), strict=True)
        return draw.stacked([draw.draw_text(self.images[i], [f"{s:.2f} {t}"]) for t, i, s in best])

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


@dataclass(frozen=True, kw_only=True)
class RegionResult:
    """Where in which picture a text is: one region a picture, best first.

    ranking    int64[I], indices of the pictures
    scores     float32[I] in that order, -1 to 1;  masks  one bool[H, W] each in that order
    """

    text: str
    images: tuple[Array, ...]
    ranking: Array
    scores: Array
    masks: tuple[Array, ...]

    def draw(self) -> Image.Image:
        """The region in the best picture."""
        return draw.draw_masks(self.images[self.ranking[0]], self.masks[0][None], [self.text])

    def to_json(self) -> dict[str, Any]:
        rows = zip(self.ranking.tolist(), self.scores, self.masks, strict=True)
        return {
            "text": self.text,
            "regions": [{"image": i, "score": round(float(s), 4), **_mask_json(m)} for i, s, m in rows],
        }


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    """A batch of pictures with their long side at the training's size, and where each lies in it.

    grids    h and w of the mask grid that is each picture's own
    """

    pixels: Pixels
    arrays: tuple[Array, ...]
    frames: tuple[Frame, ...]
    grids: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class _Squared:
    """A batch of pictures squeezed to the square that image-text training uses."""

    pixels: Pixels
    arrays: tuple[Array, ...]


class Seen:
    """Pictures that are encoded once, however many tasks ask about them; made by `Predictor.see`.

    What is known of all of them stays in memory as long as this does.
    """

    def __init__(self, arrays: tuple[Array, ...], tasks: tuple[Task, ...], predictor: "Predictor") -> None:
        self.arrays, self.tasks = arrays, tasks
        self._predictor = predictor

    @cached_property
    def fitted(self) -> list[_Fitted]:
        return list(self._predictor._fitted(self.arrays))

    @cached_property
    def squared(self) -> list[_Squared]:
        return list(self._predictor._squared(self.arrays))

    @cached_property
    def decoded(self) -> list[list[Prediction]]:
        """For each batch of `fitted`, what the latents say under each of `tasks`, from one decoder pass."""
        return [self._predictor._decode(batch, self.tasks) for batch in self.fitted]


Pictures = Sequence[Picture] | Seen


class Predictor:
    """Answers the seven tasks with one model. Methods take any number of pictures and work in batches.

    A task beyond the model's architecture raises `ValueError`.
    """

    def __init__(self, model: XDecoder, card: ModelCard, *, batch: int = 16) -> None:
        self.model, self.card, self.batch = model.eval(), card, batch
        self.device = model.task_ids.device
        self.vocabulary = card.vocabulary
        self._texts = TextCache()
        self._texts.tasks(model)  # before anybody waits

    @classmethod
    def load(cls, place: str | Path, device: str = "cpu") -> "Predictor":
        """A model that `training.checkpoint.export` wrote: its folder, or the URI of one that pyarrow opens
        (`file://`, `s3://`, `gs://` ...). Raises `ValueError` where that holds none.
        """
        with _at_hand(place) as folder:
            try:
                model, card = load_model(folder, device)
            except ValueError as error:  # of a copy, which nobody knows
                raise ValueError(str(error).replace(str(folder), _shown(place))) from None
        return cls(model, card)

    def see(self, images: Sequence[Picture], tasks: Sequence[Task] = ()) -> Seen:
        """Encode pictures once for several questions: what it returns may stand for the pictures everywhere.

        tasks    those of semantic, instance and panoptic that will be asked: they are decoded together

        seen = predictor.see(["street.jpg"], ["panoptic", "semantic"])
        predictor.panoptic(seen); predictor.semantic(seen); predictor.refer(seen, ["the bus"])
        """
        return Seen(tuple(read_picture(image) for image in _some(images)), tuple(tasks), self)

    # --------------------------------------------------------------------------------------------
    # segmentation

    def panoptic(
        self,
        images: Pictures,
        classes: Sequence[str] | Taxonomy | None = None,
        *,
        object_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        task: Task = "panoptic",
    ) -> list[PanopticResult]:
        """Every pixel to at most one segment. `task` is the token that is fed (the others serve
        experiments).
        """
        self._demand("panoptic")
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
        images: Pictures,
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
        self, images: Pictures, classes: Sequence[str] | Taxonomy | None = None, *, top_k: int = 100
    ) -> list[InstanceResult]:
        """Things, each with a mask and a score, best first."""
        self._demand("instance")
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

    def refer(self, image: Picture | Seen, phrases: Sequence[str]) -> ReferringResult:
        """The region that each phrase means; no phrase changes what another one finds.

        Raises `ValueError` without a phrase.
        """
        self._demand("referring")
        if not (phrases := _listed(phrases, "phrases")):
            raise ValueError("referring needs at least one phrase")
        (seen,) = self._fitted(self._one(image))
        together = self.model.config.quirks.phrases_together
        step = len(phrases) if together else self.batch
        masks, scores = [], []
        for start in range(0, len(phrases), step):
            some = phrases[start : start + step]
            counts = [len(some)] if together else [1] * len(some)
            where = torch.zeros(len(counts), dtype=torch.int64, device=self.device)
            logits, fits = self._meant(seen, where, some, counts)
            masks.append(postprocess.masks(logits.flatten(0, 1), seen.frames[0]))
            scores.append(fits.flatten().cpu().numpy())
        return ReferringResult(
            image=seen.arrays[0],
            phrases=phrases,
            masks=np.concatenate(masks),
            scores=np.concatenate(scores),
        )

    def find(self, images: Pictures, text: str) -> RegionResult:
        """Which region of which picture a text means: the regions that `refer` finds, ranked by the mean of
        how well region and picture fit the text.
        """
        self._demand("referring", "retrieval")
        seen = images if isinstance(images, Seen) else self.see(images)
        masks: list[Array] = []
        fits: list[Tensor] = []
        for batch in seen.fitted:
            count = len(batch.arrays)
            where = torch.arange(count, device=self.device)
            logits, fit = self._meant(batch, where, [text] * count, [1] * count)
            for own, (height, width), frame in zip(logits, batch.grids, batch.frames, strict=True):
                masks.append(postprocess.masks(own[:, :height, :width], frame)[0])
            fits.append(fit[:, 0].cpu())
        pictures = self.retrieve(seen, [text]).scores[:, 0]
        scores = (torch.cat(fits).numpy() + pictures) / 2
        ranking = np.argsort(-scores, kind="stable")
        return RegionResult(
            text=text,
            images=seen.arrays,
            ranking=ranking,
            scores=scores[ranking],
            masks=tuple(masks[i] for i in ranking),
        )

    @torch.no_grad()
    def _meant(
        self, seen: _Fitted, where: Tensor, phrases: Sequence[str], counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """What phrases mean, counts[r] of them in request r about picture int64[R] of the batch.

        Mask logits of the chosen latents alone, float[R, P, h, w], and how well each fits, float[R, P].
        """
        text, sentences = pack(self.model.encode_texts(phrases), counts)
        task = self._task("referring", len(counts))
        final = self.model.ask(seen.pixels, "referring", where, task, text).final
        nearest = self.model.similarity(final.semantic, sentences)  # float[R, O, P]
        chosen = replace(final, mask_embed=_rows(final.mask_embed, nearest.argmax(1)))
        return self.model.masks(chosen, seen.pixels, where), nearest.amax(1) / self.model.scale()

    # -------------------------------------------------------------------------------------------- image and
    # text

    def retrieve(self, images: Pictures, texts: Sequence[str]) -> RetrievalResult:
        """How well pictures fit texts: the mean of the decoder's and the backbone's cosine (X-Decoder, 2.4).

        Raises `ValueError` without a text.
        """
        self._demand("retrieval")
        if not (texts := _listed(texts, "texts")):
            raise ValueError("retrieval needs at least one text")
        rows: list[Tensor] = []
        pictures: list[Array] = []
        with torch.no_grad():
            sentences = unit(self.model.encode_texts(texts).sentence)
            for seen in self._squared(images):
                count = len(seen.arrays)
                where = torch.arange(count, device=self.device)
                task = self._task("retrieval", count)
                final = self.model.ask(seen.pixels, "segmentation", where, task).final
                both = (final.image, self.model.embed_pooled(seen.pixels))
                rows.append(torch.stack([product(unit(x), sentences.T) for x in both]).mean(0).cpu())
                pictures += seen.arrays
        return RetrievalResult(images=tuple(pictures), texts=texts, scores=torch.cat(rows).numpy())

    def caption(self, images: Pictures, *, max_tokens: int = 50, search: Search = GREEDY) -> list[TextResult]:
        """A sentence about each picture."""
        self._demand("captioning")
        results = []
        for seen in self._squared(images):
            where = torch.arange(len(seen.arrays), device=self.device)
            task = self._task("captioning", len(where))
            texts = generate.captions(self.model, seen.pixels, where, task, max_tokens, search)
            results += [TextResult(image=a, text=t) for a, t in zip(seen.arrays, texts, strict=True)]
        return results

    def describe(
        self,
        image: Picture | Seen,
        regions: Sequence[str | Array],
        *,
        max_tokens: int = 50,
        search: Search = GREEDY,
    ) -> list[TextResult]:
        """A sentence about each region of a picture, which a phrase or a mask bool[H, W] gives.

        The words look at the region alone (X-Decoder, 2.5). Raises `ValueError` without a region, or where a
        mask is not of the picture's size.
        """
        self._demand("captioning")
        if not (regions := _listed(regions, "regions")):
            raise ValueError("describing needs at least one region: a phrase or a mask")
        seen = self._one(image)
        phrases = [region for region in regions if isinstance(region, str)]
        meant = iter(self.refer(seen, phrases).masks if phrases else ())
        masks = [next(meant) if isinstance(region, str) else region for region in regions]
        (squared,) = self._squared(seen)
        size = squared.arrays[0].shape[:2]
        for mask in masks:
            if mask.dtype != bool or mask.shape != size:
                raise ValueError(f"a region is bool{list(size)}, this is {mask.dtype}{list(mask.shape)}")
        side = self.card.image_text_size
        region = torch.stack([_squeezed(mask, side) for mask in masks]).to(self.device)
        where = torch.zeros(len(masks), dtype=torch.int64, device=self.device)
        task = self._task("captioning", len(masks))
        texts = generate.captions(self.model, squared.pixels, where, task, max_tokens, search, region)
        return [TextResult(image=squared.arrays[0], text=text) for text in texts]

    def answer(
        self, image: Picture | Seen, questions: Sequence[str], answers: Sequence[str] | None = None
    ) -> list[TextResult]:
        """The answer to each question, chosen from a list (by default that of the training).

        Raises `ValueError` without a question, and where there is no list to choose from.
        """
        self._demand("vqa")
        if not (questions := _listed(questions, "questions")):
            raise ValueError("answering needs at least one question")
        listed = _listed(answers, "answers") if answers is not None else self.vocabulary.answers
        if not listed:
            raise ValueError(
                "no answers to choose from: the model was trained without questions; give a list"
            )
        with torch.no_grad():
            (seen,) = self._squared(self._one(image))
            text = self.model.encode_texts(questions)
            where = torch.zeros(len(questions), dtype=torch.int64, device=self.device)
            final = self.model.ask(seen.pixels, "vqa", where, self._task("vqa", len(questions)), text).final
            probs = answer_logits(self.model, final, text, self.model.encode_texts(listed).sentence).softmax(
                -1
            )
        best = [(int(p.argmax()), float(p.max())) for p in probs]
        return [
            TextResult(image=seen.arrays[0], text=listed[i], question=q, score=s)
            for q, (i, s) in zip(questions, best, strict=True)
        ]

    # -------------------------------------------------------------------------------------------- inside

    def _demand(self, *tasks: Task) -> None:
        """Raises `ValueError` where a task is beyond the model's architecture."""
        able = self.model.config.able
        for task in tasks:
            if task not in able:
                raise ValueError(
                    f"this model cannot do {task!r}: its architecture (model.output, model.text, "
                    f"model.classes) is for {list(able)}; ask another model"
                )

    def _taxonomy(self, classes: Sequence[str] | Taxonomy | None) -> Taxonomy:
        """A class list as a taxonomy; names the training did not know count as things."""
        if classes is None:
            return self.vocabulary.taxonomy
        if isinstance(classes, Taxonomy):
            return classes
        known = {c.name: c for c in self.vocabulary.taxonomy.categories}
        categories = tuple(known.get(n, Category(name=n, isthing=True)) for n in _listed(classes, "classes"))
        return Taxonomy(name="prediction", categories=categories)

    def _one(self, image: Picture | Seen) -> Seen:
        """A single picture. Raises `ValueError` where several were seen."""
        seen = image if isinstance(image, Seen) else self.see([image])
        if len(seen.arrays) != 1:
            raise ValueError(f"this asks about one picture, {len(seen.arrays)} were seen: see each alone")
        return seen

    def _task(self, task: Task, rows: int) -> Tensor:
        return self._texts.tasks(self.model)[TASKS.index(task)].expand(rows, -1)

    @torch.no_grad()
    def _segments(
        self, images: Pictures, taxonomy: Taxonomy, task: Task, zeroshot: ZeroShot | None = None
    ) -> Iterator[tuple[Array, Tensor, Tensor, Frame]]:
        """For each picture: itself, class probabilities [O, K + 1], mask logits [O, h, w], and its frame."""
        classes = self._classes(taxonomy.names)
        for seen, final in self._decoded(images, task):
            where = torch.arange(len(seen.arrays), device=self.device)
            probs, masks = self.model.pairs(final, seen.pixels, where, classes)
            own = [m[:, :h, :w] for m, (h, w) in zip(masks, seen.grids, strict=True)]
            if zeroshot is not None and zeroshot.branch is not None and self.model.config.output == "masks":
                logits = self.model.class_logits(final.semantic, classes)
                probs = self._second_opinion(zeroshot, seen, logits, own, taxonomy)
            yield from zip(seen.arrays, probs, own, seen.frames, strict=True)

    def _second_opinion(
        self, zeroshot: ZeroShot, seen: _Fitted, logits: Tensor, masks: Sequence[Tensor], taxonomy: Taxonomy
    ) -> Tensor:
        """Class probabilities float[B, O, K + 1] by the logits of the same shape and by their looks."""
        known, names = self._seen(taxonomy), taxonomy.names
        views = [_tensor(a, f.valid).to(self.device) for a, f in zip(seen.arrays, seen.frames, strict=True)]
        each = zip(logits, views, masks, seen.frames, strict=True)
        return torch.stack([zeroshot.probabilities(*one, names, known) for one in each])

    def _decoded(self, images: Pictures, task: Task) -> Iterator[tuple[_Fitted, Prediction]]:
        """Batches of pictures, and what the latents say of them under a task."""
        if isinstance(images, Seen) and task in images.tasks:
            answers = (batch[images.tasks.index(task)] for batch in images.decoded)
            yield from zip(images.fitted, answers, strict=True)
        else:
            for batch in self._fitted(images):
                yield batch, self._decode(batch, (task,))[0]

    def _seen(self, taxonomy: Taxonomy) -> Tensor:
        """bool[K], the classes that had masks in the training."""
        known = set(self.vocabulary.taxonomy.names)
        return torch.tensor([name in known for name in taxonomy.names], device=self.device)

    def _classes(self, names: Sequence[str]) -> Tensor:
        """What `XDecoder.class_logits` takes for these classes."""
        if self.model.config.classes:
            return columns(self.vocabulary.taxonomy.names, names).to(self.device)
        return self._texts.classes(self.model, tuple(names))

    @torch.no_grad()
    def _decode(self, batch: _Fitted, tasks: Sequence[Task]) -> list[Prediction]:
        """One decoder pass for all pictures of a batch under each of the tasks; a prediction a task."""
        count = len(batch.arrays)
        where = torch.arange(count, device=self.device).repeat(len(tasks))
        sentences = torch.cat([self._task(task, count) for task in tasks])
        final = self.model.ask(batch.pixels, "segmentation", where, sentences).final
        if self.model.config.quirks.image_query_segments:
            final = final.with_image()
        parts = zip(*(x.split(count) for x in (final.semantic, final.image, final.mask_embed)), strict=True)
        return [Prediction(semantic=s, image=i, mask_embed=m, text=None) for s, i, m in parts]

    @torch.no_grad()
    def _fitted(self, images: Pictures) -> Iterator[_Fitted]:
        """Pictures with their long side at the training's size, each padded to a multiple of the stride."""
        if isinstance(images, Seen):
            yield from images.fitted
            return
        for arrays in self._batches(images):
            sizes = [_fit(array.shape[:2], self.card.image_size) for array in arrays]
            canvases = [_canvas(a, s, self.model.stride) for a, s in zip(arrays, sizes, strict=True)]
            frames = tuple(
                Frame(
                    padded=(p.shape[0], p.shape[1]),
                    valid=s,
                    original=(a.shape[0], a.shape[1]),
                    bicubic=self.model.config.quirks.bicubic_masks,
                )
                for (_, p), s, a in zip(canvases, sizes, arrays, strict=True)
            )
            stride = self.model.backbone.strides[0]
            yield _Fitted(
                pixels=self.model.encode_each(
                    [canvas.to(self.device) for canvas, _ in canvases],
                    [padding.to(self.device) for _, padding in canvases],
                ),
                arrays=tuple(arrays),
                frames=frames,
                grids=tuple((f.padded[0] // stride, f.padded[1] // stride) for f in frames),
            )

    @torch.no_grad()
    def _squared(self, images: Pictures) -> Iterator[_Squared]:
        """Pictures squeezed to the square that image-text training uses."""
        if isinstance(images, Seen):
            yield from images.squared
            return
        side = self.card.image_text_size
        for arrays in self._batches(images):
            canvas = torch.stack([_tensor(a, (side, side)) for a in arrays]).to(self.device)
            padding = torch.zeros(len(arrays), side, side, dtype=torch.bool, device=self.device)
            yield _Squared(pixels=self.model.encode(canvas, padding), arrays=tuple(arrays))

    def _batches(self, images: Sequence[Picture]) -> Iterator[list[Array]]:
        images = _some(images)
        for start in range(0, len(images), self.batch):
            yield [read_picture(image) for image in images[start : start + self.batch]]


class TextCache:
    """The tasks' sentences, and class lists as embeddings: those used last are kept, as long as the weights
    stay what they are, and are of the weights' precision whatever autocast says.

    Lists of tens of thousands of names pass the text encoder in chunks. An optimiser's step or another
    checkpoint makes new embeddings; writing to a parameter's `.data` goes unnoticed. Weights made in
    inference mode do not tell when they change: of those nothing is kept.
    """

    def __init__(self, most_names: int = 1 << 16) -> None:
        self.most_names = most_names  # over all lists; chosen by us: 128 MiB at a width of 512
        self._kept: OrderedDict[tuple[str, ...], tuple[object, Tensor]] = OrderedDict()

    def tasks(self, model: XDecoder) -> Tensor:
        """float[7, D], what is said to the model in each task."""
        return self._known(model, (), lambda: model.text(model.task_ids).sentence)

    def classes(self, model: XDecoder, names: tuple[str, ...]) -> Tensor:
        """Unit float[K + 1, D] of K names and no object, unless that is learned."""
        return self._known(model, names, lambda: embed_classes(model, names))

    def _known(self, model: XDecoder, names: tuple[str, ...], embed: Callable[[], Tensor]) -> Tensor:
        weights = [
            object() if p.is_inference() else (p.data_ptr(), p._version) for p in model.text.parameters()
        ]
        known = self._kept.pop(names, None)
        if known is None or known[0] != weights:
            with torch.no_grad(), torch.autocast(model.task_ids.device.type, enabled=False):
                known = (weights, embed())
        self._kept[names] = known
        while len(self._kept) > 1 and sum(map(len, self._kept)) > self.most_names:
            self._kept.popitem(last=False)
        return known[1]


@torch.no_grad()
def embed_classes(model: XDecoder, names: Sequence[str], chunk: int = 1024) -> Tensor:
    """Class names (synonyms between commas) and no object, unless that is learned -> unit float[K + 1, D].

    Texts pass the encoder `chunk` at a time, the short ones first, so that a long one lengthens few others.
    """
    texts = model.class_texts(names)
    order = (texts.ids == END).int().argmax(1).argsort(stable=True)
    sentences = torch.empty(len(order), model.config.text_width, device=model.task_ids.device)
    for rows in order.split(chunk):
        longest = int((texts.ids[rows] == END).int().argmax(1).max()) + 1
        ids = texts.ids[rows, :longest].to(sentences.device)
        sentences[rows.to(sentences.device)] = model.text(ids).sentence.to(sentences.dtype)
    return texts.embed(sentences)


@contextmanager
def _at_hand(place: str | Path) -> Iterator[Path]:
    """The folder of a model; of one that lies elsewhere a copy, which goes when the context ends."""
    if isinstance(place, Path) or not re.match(r"[a-z][a-z0-9+.-]+:/", place):
        yield Path(place).expanduser()
        return
    shown = _shown(place)
    if place.startswith(("models:", "runs:")):
        raise ValueError(
            f"{shown} is known to MLflow alone: give the folder that `jobs.tracking.connect(store)` fetches "
            "(`tracker.fetch(tracker.version(model, version), cache)`), or type `python -m jobs predict`"
        )
    with TemporaryDirectory(prefix="xdecoder-") as folder:
        name = CARD
        try:
            files, root = fs.FileSystem.from_uri(place)
            for name in (CARD, WEIGHTS):
                fs.copy_files(f"{root}/{name}", f"{folder}/{name}", files, fs.LocalFileSystem())
        except FileNotFoundError:
            raise ValueError(f"{shown} holds no model: {name} is missing") from None
        except (OSError, ValueError, ArrowException) as error:
            why = str(error).replace(place, shown)
            raise ValueError(f"{shown}: {name} cannot be fetched ({why})") from None
        yield Path(folder)


def _shown(place: str | Path) -> str:
    """As it may stand in a message: without what grants access."""
    return re.sub(r"(?<=//)[^/@]*:[^/@]*@", "", str(place).partition("?")[0])


def _some(images: Sequence[Picture]) -> tuple[Picture, ...]:
    if isinstance(images, str | PathLike | Image.Image) or (
        isinstance(images, np.ndarray) and images.ndim < 4
    ):
        raise ValueError("pictures are a list, this is one: write [picture]")
    if not (listed := tuple(images)):
        raise ValueError("no pictures given")
    return listed


def _listed(items: Sequence[T], what: str) -> tuple[T, ...]:
    """Raises `ValueError` for one string, which would count as a list of its letters."""
    if isinstance(items, str):
        raise ValueError(f"{what} are a list, this is one text: write [{items!r}]")
    return tuple(items)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """float[R, O, D] at int64[R, n] -> float[R, n, D]."""
    return table.gather(1, index[..., None].expand(-1, -1, table.shape[-1]))


def read_picture(picture: Picture) -> Array:
    """Anything a user calls a picture -> uint8[H, W, 3], upright as EXIF says, as the training pictures are.

    Raises `ValueError` where a file is missing or no picture, or an array has another shape or type.
    """
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or not picture.size:
            raise ValueError(
                f"a picture is uint8[H, W, 3], this is {picture.dtype}{list(picture.shape)}; "
                "PIL images (Image.fromarray) may be grey or have alpha"
            )
        return picture
    if not isinstance(picture, Image.Image | str | PathLike):
        kind = type(picture).__name__
        raise ValueError(f"a picture is a path, a PIL image or an array uint8[H, W, 3], this is a {kind}")
    try:
        with nullcontext(picture) if isinstance(picture, Image.Image) else Image.open(picture) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise ValueError(f"{picture}: no such picture") from None
    except Exception as error:  # what a decoder raises on hostile bytes is anything
        raise ValueError(f"{picture}: cannot be read as a picture ({error})") from None


def _fit(size: tuple[int, ...], side: int) -> tuple[int, int]:
    fit = side / max(size)
    return max(1, round(size[0] * fit)), max(1, round(size[1] * fit))


def _canvas(array: Array, size: tuple[int, int], stride: int) -> tuple[Tensor, Tensor]:
    """A picture at this size on a grey canvas whose sides are the next multiples of the stride: float32[3, H,
    W], and where it is padding, bool[H, W].
    """
    padded = [-(-side // stride) * stride for side in size]
    canvas = torch.full((3, *padded), PAD_VALUE / 255)
    padding = torch.ones(*padded, dtype=torch.bool)
    canvas[:, : size[0], : size[1]] = _tensor(array, size)
    padding[: size[0], : size[1]] = False
    return canvas, padding


def _squeezed(mask: Array, side: int) -> Tensor:
    """bool[H, W] -> bool[side, side], where any pixel of the cell is inside."""
    return F.adaptive_max_pool2d(torch.from_numpy(mask)[None].float(), side)[0] > 0


def _tensor(array: Array, size: tuple[int, int]) -> Tensor:
    image = Image.fromarray(array)
    if array.shape[:2] != size:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _mask_json(mask: Array) -> dict[str, Any]:
    area, bbox = area_and_bbox(mask)
    rle = encode_rle(mask)
    return {"area": area, "bbox": list(bbox), "mask": {"size": list(rle.size), "counts": rle.counts}}
