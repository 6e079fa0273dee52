"""An original X-Decoder's recorded computation, repeated by ours, stage by stage (X-Decoder, 7).

Every stage starts from what the original recorded before it, so a difference is the stage's own; the stages
"from the picture" start from pixels. Nothing here computes what the model, the losses or the post-processing
compute: they are called, with the recorded random draws.

Letters: `B` images, `O` latents, `Q` = O + 1 queries of the original (its last is our image query).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode

from schemas.jobs import LossConfig
from schemas.tasks import TASKS, Task
from xdecoder.inference import postprocess
from xdecoder.inference.generate import GREEDY, captions, greedy
from xdecoder.inference.postprocess import Frame
from xdecoder.model.decoder import Level, Outputs, PatternName, Pixels, Prediction
from xdecoder.model.original import load, model_config, translate
from xdecoder.model.pixel_decoder import PixelDecoder
from xdecoder.model.text import TextFeatures
from xdecoder.model.xdecoder import XDecoder
from xdecoder.prompts import detokenize, tokenize
from xdecoder.training import losses
from xdecoder.training.batch import CaptionTargets, MaskTargets, PhraseTargets, Targets, Work

ABSOLUTE, RELATIVE = 1e-4, 1e-4
DOUBT = 5e-4  # rounding decides whether a mask logit below it is positive
PIXELS = 1e-3  # the share of pixels that rounding may move over a threshold

# What ours does otherwise, and why the comparison holds all the same.
DELIBERATE = (
    "padding is masked, phrases are decoded one by one, the image query sees the whole picture and is no "
    "segment, masks are resized bilinearly (the original's ways are model.quirks: off by default, on here)",
    "phrases with equal words do not share their targets (train.loss.same_phrases: off by default, on here)",
    "grounding weighs phrases alike; the original takes the mean of each picture first, and has factors for "
    "phrases and class names (here our term of each picture is weighed so)",
    "nouns teach latents of pictures with captions (train.loss.nouns: off by default); the original's, of "
    "those with masks, teach no unmatched latent, because its matcher normalises in place (here its loss "
    "is added by its formula, for the gradients of the whole)",
    "texts are encoded no longer than they are, and padded with 0 behind their end mark; the encoder is "
    "causal, so nothing that is read changes",
    "captions stop at the end mark; the original goes on, and cuts afterwards",
    "class logits, too, clamp the scale at 100",
    "contrastive gradients are those of the joined batch; the original's are divided by the number of ranks",
    "questions are read as a whole and answered by texts; the original's VQA head is not taken over",
    "the recipe trains with bare class names; the original draws one of 81 sentences for each in every step "
    "(imported weights are asked with the mean of all, as the original's)",
    "a caption's words look at the cells that their region touches; the original takes the nearest pixel of "
    "each (here ours do, too)",
)
# What is recorded and not compared, and why: the place in the file, or its beginning.
UNCOMPARED: Mapping[str, str] = {
    "config": "settings, which ours are made from",
    "image_sizes": "the pictures say them",
    "seg_targets": "truths, given to both",
    "coco_text_emb": "class names of the training: embeddings whose texts are not recorded, given to both",
    "seg_loss_matches": "which latent was matched to which noun, given to both; other matches of classes, "
    "masks and phrases would change their losses",
    "weight_dict": "weights, which ours are made from: those of the last layer, which all layers must have",
    "captioning_infer.texts": "the recorded tokens once more, in words",
    "captioning_infer_masked.texts": "the same",
    "grads, of the text encoder": "class names, nouns and phrases taught it, too, and are recorded as "
    "embeddings alone",
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One comparison: the largest difference, and how large it may be. NaN is past any tolerance."""

    name: str
    difference: float
    tolerance: float

    @property
    def equal(self) -> bool:
        return self.difference <= self.tolerance


class Golden:
    """A recorded computation; `golden["seg_eval", "pred_logits"]` raises `ValueError` where it is missing."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __getitem__(self, path: str | tuple[str | int, ...]) -> Any:
        found = self.content
        for depth, key in enumerate(path := (path,) if isinstance(path, str) else path):
            try:
                found = found[key]
            except (KeyError, IndexError, TypeError):
                where = ".".join(map(str, path[: depth + 1]))
                raise ValueError(f"no golden file of an X-Decoder: {where} is missing") from None
        return found


def replay(content: Any) -> Iterator[Stage]:
    """Compare all stages, in the order of computation.

    Raises `ValueError` where the content is no recorded computation, or of another architecture.
    """
    run = _Run(Golden(content))
    with torch.no_grad():
        yield from _pixels(run)
        yield from _texts(run)
        yield from _decoder(run)
        yield from _answers(run)
        yield from _from_the_picture(run)
    yield from _training(run)


class _Run:
    """The recorded computation and our model with its weights."""

    def __init__(self, golden: Golden) -> None:
        self.golden = golden
        state, decoder = golden["state_dict"], golden["config", "MODEL", "DECODER"]
        heads = golden["config", "MODEL", "DECODER", "NHEADS"]
        text_heads = golden["config", "MODEL", "TEXT", "HEADS"]
        self.decoder = Golden(decoder)
        self.model = XDecoder(model_config(state, heads=heads, text_heads=text_heads)).eval()
        load(self.model, state)
        self.queries = self.model.config.latents + 1
        self.followed, self.masked = "", 0
        self.layer: int | None = None  # the one that losses see alone, counted from the last
        self.asked = self.model.ask
        setattr(self.model, "ask", self._of_layer)  # noqa: B010
        self.cross_mask = self.model.decoder._cross_mask
        setattr(self.model.decoder, "_cross_mask", self._settled)  # noqa: B010
        self.outside = self.model.decoder._outside
        setattr(self.model.decoder, "_outside", self._nearest)  # noqa: B010

    def follow(self, heads: str) -> None:
        """From here on, attention masks are settled by those of this record."""
        self.followed = heads

    def _of_layer(self, *request: Any) -> Outputs:
        """What the model is asked for, of one layer alone where the losses shall see no more."""
        outputs = self.asked(*request)
        if self.layer is None:
            return outputs
        return replace(outputs, predictions=(outputs.predictions[-1 - self.layer],))

    def rows(self, *, silent: bool) -> slice:
        """Ours among the original's queries: a referring request's latents are copies behind all others."""
        return slice(self.queries, None) if silent else slice(self.queries)

    def _settled(
        self, prediction: Prediction, level: Level, images: Tensor, looking: int, silent: bool = False
    ) -> Tensor:
        """The decoder's attention mask; where rounding decides a cell, the original's decision holds.

        Otherwise a cell may fall to the other side, and then everything behind it differs.
        """
        ours = self.cross_mask(prediction, level, images, looking, silent)
        recorded = self.golden[self.followed]
        theirs = recorded[self.masked % (len(recorded) - 1)]["attn_mask"]
        theirs = theirs.unflatten(0, (-1, self.model.config.heads))[images, 0, self.rows(silent=silent)]
        self.masked += 1
        doubtful = self.doubtful(prediction, level, images, silent=silent)
        part = ours[:, 0, : doubtful.shape[1]]
        part.copy_(torch.where(doubtful, theirs, part))
        return ours

    def _nearest(self, level: Level, images: Tensor, region: Tensor | None) -> Tensor:
        """As `Decoder._outside`, a cell of a region by its nearest pixel."""
        if region is None:
            return self.outside(level, images, region)
        blocked = F.interpolate((~region)[:, None].float(), level.grid, mode="nearest").flatten(1) > 0.5
        return blocked & ~blocked.all(-1, keepdim=True)

    def doubtful(self, prediction: Prediction, level: Level, images: Tensor, *, silent: bool) -> Tensor:
        """bool[R, O or Q, hw]: mask logits that are zero within rounding."""
        whole = prediction if silent else prediction.with_image()
        return (whole.mask_embed @ level.mask_features[images]).abs() < DOUBT

    @property
    def draws(self) -> tuple[list["Draws"], list["Draws"]]:
        """What is drawn for the layers that the losses see."""
        segmentation, grounding = _recorded_draws(self)
        if self.layer is None:
            return segmentation, grounding
        return [segmentation[-1 - self.layer]], grounding[::-1][self.layer : self.layer + 1]

    @cached_property
    def batch(self) -> tuple[Tensor, Tensor]:
        """Pictures float32[B, 3, H, W] in [0, 1] side by side, and their padding bool[B, H, W]."""
        pictures, size = self.golden["images_uint8"], self.golden["batched"].shape
        images, padding = torch.zeros(size), torch.ones(size[0], *size[2:], dtype=torch.bool)
        for i, picture in enumerate(pictures):
            height, width = picture.shape[1:]
            images[i, :, :height, :width] = picture / 255
            padding[i, :height, :width] = False
        return images, padding

    def recorded_pixels(self) -> Pixels:
        """As if our pixel side had computed what the original's did."""
        features, maps = (
            self.golden["pixel_decoder", "mask_features"],
            self.golden["pixel_decoder", "multi_scale"],
        )
        none = torch.zeros_like(self.batch[1])
        return Pixels(
            mask_features=features,
            levels=tuple(self.model.decoder.level(i, m, features, none) for i, m in enumerate(maps)),
            pooled=self.golden["backbone", "res5"].mean((2, 3)),
        )

    def ask(
        self, pixels: Pixels, pattern: PatternName, images: int, text: TextFeatures | None = None
    ) -> Outputs:
        """Requests about the first pictures."""
        no_task = torch.zeros(images, self.model.config.width)
        return self.model.ask(pixels, pattern, torch.arange(images), no_task, text)

    def frame(self, image: int, size: Sequence[int]) -> Frame:
        """Where a picture lies in the batch, for answers of a size."""
        padded, valid = self.golden["batched"].shape[2:], self.golden["images_uint8"][image].shape[1:]
        return Frame(
            padded=(padded[0], padded[1]),
            valid=(valid[0], valid[1]),
            original=(size[0], size[1]),
            bicubic=self.model.config.quirks.bicubic_masks,
        )


# ------------------------------------------------------------------------------------------------ inference


def _pixels(run: _Run) -> Iterator[Stage]:
    golden, model = run.golden, run.model
    images, padding = run.batch
    shown = torch.where(padding[:, None], model.backbone.mean, images)
    yield _near("pixels", (shown - model.backbone.mean) / model.backbone.std, golden["batched"])
    recorded = list(golden["backbone"].values())
    for name, ours, theirs in zip(golden["backbone"], model.backbone(shown), recorded, strict=False):
        yield _near(f"backbone {name}", ours, theirs)
    none = torch.zeros_like(padding)
    assert isinstance(model.pixel_decoder, PixelDecoder)
    encoded = model.pixel_decoder._encode(model.pixel_decoder.enter(recorded[-1]), none)
    yield _near("pixel decoder, encoder", encoded, golden["pixel_decoder", "transformer_encoder_features"])
    features, maps = model.pixel_decoder(recorded, none)
    yield _near("pixel decoder, mask features", features, golden["pixel_decoder", "mask_features"])
    for i, (ours, theirs) in enumerate(zip(maps, golden["pixel_decoder", "multi_scale"], strict=False)):
        yield _near(f"pixel decoder, level {i}", ours, theirs)


def _texts(run: _Run) -> Iterator[Stage]:
    golden = run.golden
    yield _token_ids(run)
    text = run.model.text(golden["text", "input_ids"])
    yield _near("text, tokens", text.tokens, golden["text", "token_emb"])
    yield _near("text, sentences", text.sentence, golden["text", "class_emb"])
    yield _near("text, class names", F.normalize(text.sentence, dim=-1), golden["text", "class_emb_normed"])
    phrases, sentences = _phrases(run)
    yield _near("text, tokens of phrases", phrases.tokens[0], golden["grounding_eval_in", "query_emb"])
    yield _near("text, sentences of phrases", sentences[0], golden["grounding_eval_in", "class_emb"])
    caption = run.model.text(golden["vlp_in", "input_ids"])
    yield _near("text, tokens of captions", caption.tokens, golden["vlp_in", "token_emb"])
    yield _near("text, sentences of captions", caption.sentence, golden["vlp_in", "class_emb"])
    queries = torch.cat(list(golden["vlp_caption_tokens_after_forward"]))
    yield _near("text, captions as queries", caption.tokens, queries)


def _token_ids(run: _Run) -> Stage:
    """Texts whose words have other ids than recorded, up to and with the end mark."""
    golden, context = run.golden, run.model.config.context
    other = 0
    for texts, tokens in (
        (golden["text", "texts"], golden["text"]),
        (golden["vlp_in", "texts"], golden["vlp_in"]),
        (golden["grounding_eval_in", "texts"], golden["grounding_eval_in", "tokens"]),
    ):
        ids, read = Golden(tokens)["input_ids"], Golden(tokens)["attention_mask"].bool()
        for text, row, real in zip(texts, ids, read, strict=True):
            other += tokenize([text], context)[0].tolist() != row[real].tolist()
    return Stage(name="text, ids that differ", difference=other, tolerance=0)


def _phrases(run: _Run) -> tuple[TextFeatures, Tensor]:
    ids = run.golden["grounding_eval_in", "tokens", "input_ids"]
    return losses.pack(run.model.text(ids), [len(ids)])


def _decoder(run: _Run) -> Iterator[Stage]:
    """Every layer's heads, in the four layouts of queries that were recorded."""
    golden, pixels, words = run.golden, run.recorded_pixels(), run.model.text
    names = golden["text", "class_emb_normed"]
    pictures = len(golden["batched"])
    tokens = golden["seg_grounding_tokens_padded"].transpose(0, 1)
    layouts: tuple[tuple[str, PatternName, int, TextFeatures | None, str, Tensor], ...] = (
        ("segmentation", "segmentation", pictures, None, "seg_eval", names),
        ("referring", "referring", 1, _phrases(run)[0], "grounding_eval", names),
        ("beside phrases", "segmentation", 1, None, "grounding_eval", names),
        ("captioning", "captioning", pictures, words(golden["vlp_in", "input_ids"]), "vlp_train", names),
        ("referring, padded", "referring", pictures, _as_text(tokens), "seg_train", golden["coco_text_emb"]),
        ("beside phrases, padded", "segmentation", pictures, None, "seg_train", golden["coco_text_emb"]),
    )
    for name, pattern, images, text, key, classes in layouts:
        run.follow(f"{key}_heads")
        asked = run.ask(pixels, pattern, images, text)
        yield from _heads(run, name, pixels, asked, golden[f"{key}_heads"], classes)
        yield _outputs(run, name, pixels, asked, golden[key], classes)


def _heads(
    run: _Run,
    name: str,
    pixels: Pixels,
    outputs: Outputs,
    recorded: Sequence[Mapping[str, Any]],
    classes: Tensor,
) -> Iterator[Stage]:
    """One stage a layer: meanings, masks, class logits, slots; and one for the attention masks of all.

    A referring request's latents are copies behind all others, which do as if no phrase were there.
    """
    referring, rows = name.startswith("referring"), run.rows(silent=name.startswith("referring"))
    moved = []
    for layer, (prediction, theirs) in enumerate(zip(outputs.predictions, recorded, strict=True)):
        said = _said(run, name, pixels, outputs, prediction, classes)
        kept = {kind: Golden(theirs)[f"outputs_{kind}"] for kind in said}
        difference = _largest(_sides(run, name, pixels, outputs, said, kept))
        yield Stage(name=f"{name}, layer {layer}", difference=difference, tolerance=ABSOLUTE)
        level = pixels.levels[layer % len(pixels.levels)]
        ours = run.cross_mask(prediction, level, outputs.images, run.queries, referring)
        count = len(outputs.images)
        blocked = theirs["attn_mask"].unflatten(0, (count, -1))[:, 0, rows]  # alike for all heads
        clear = ~run.doubtful(prediction, level, outputs.images, silent=referring)
        clear &= ~blocked.all(-1, keepdim=True)  # of the last layer, whose mask blocks no layer, as it was
        moved.append(_largest([((ours[:, 0, : clear.shape[1]] & clear).float(), (blocked & clear).float())]))
    yield Stage(name=f"{name}, attention masks", difference=_worst(moved), tolerance=0)


# What a prediction says -> its name among the outputs of the original.
HANDED_ON = {
    "mask": "pred_masks",
    "caption": "pred_captions",
    "class": "pred_logits",
    "captionting": "pred_captionings",
}


def _outputs(
    run: _Run, name: str, pixels: Pixels, outputs: Outputs, recorded: Mapping[str, Any], classes: Tensor
) -> Stage:
    """What the original hands on of all layers, the last on its own."""
    pairs: list[tuple[Tensor, Tensor]] = []
    layers = [*Golden(recorded)["aux_outputs"], recorded]
    for prediction, theirs in zip(outputs.predictions, layers, strict=True):
        said = _said(run, name, pixels, outputs, prediction, classes)
        kept = {kind: theirs.get(HANDED_ON[kind]) for kind in said}
        pairs += _sides(run, name, pixels, outputs, said, kept)
    return Stage(name=f"{name}, outputs", difference=_largest(pairs), tolerance=ABSOLUTE)


def _said(
    run: _Run, name: str, pixels: Pixels, outputs: Outputs, prediction: Prediction, classes: Tensor
) -> dict[str, Tensor]:
    """What one layer says, under the original's names; the image query as one more latent."""
    whole = prediction if name.startswith("referring") else prediction.with_image()
    said = {
        "mask": run.model.masks(whole, pixels, outputs.images),
        "caption": whole.semantic,
        "class": run.model.similarity(whole.semantic, classes),
    }
    if whole.text is not None:
        said["captionting"] = run.model.caption_embed(whole.text)
    return said


def _sides(
    run: _Run,
    name: str,
    pixels: Pixels,
    outputs: Outputs,
    said: Mapping[str, Tensor],
    recorded: Mapping[str, Tensor | None],
) -> list[tuple[Tensor, Tensor]]:
    """Ours beside theirs, of what is recorded."""
    rows, alone = run.rows(silent=name.startswith("referring")), len(outputs.images) < len(pixels.pooled)
    pairs = []
    for kind, theirs in recorded.items():
        if theirs is None:
            continue
        ours, theirs = said[kind], theirs if kind == "captionting" else theirs[:, rows]
        if kind == "mask" and alone:  # other rounding: the original computed its maps anew, for one picture
            ours, theirs = ours.sigmoid(), theirs.sigmoid()
        pairs.append((ours, theirs))
    return pairs


def _answers(run: _Run) -> Iterator[Stage]:
    """From recorded logits to answers."""
    golden = run.golden
    logits, masks = golden["seg_eval", "pred_logits"], golden["seg_eval", "pred_masks"]
    yield from _segments(run, "", logits.softmax(-1), masks)
    _, sentences = _phrases(run)
    meaning, masks = (golden["grounding_eval", k][0, run.queries :] for k in ("pred_captions", "pred_masks"))
    yield _referring(run, "", run.model.similarity(meaning, sentences[0]), masks)


def _segments(run: _Run, where: str, probs: Tensor, masks: Tensor) -> Iterator[Stage]:
    test, recorded = Golden(run.decoder["TEST"]), run.golden["evaluate"]
    thresholds = {
        "object_threshold": test["OBJECT_MASK_THRESHOLD"],
        "overlap_threshold": test["OVERLAP_THRESHOLD"],
    }
    top_k = run.golden["config", "COCO", "TEST", "DETECTIONS_PER_IMAGE"]
    measured: list[tuple[float, ...]] = []
    for i, theirs in enumerate(recorded):
        frame = run.frame(i, theirs["panoptic"].shape)
        things = _things(theirs, probs.shape[-1] - 1)
        labels = torch.from_numpy(postprocess.semantic(probs[i], masks[i], frame))
        votes = theirs["sem_seg"]  # what their winner has more than ours is zero where the labels are equal
        lost = (votes.max(0).values - votes.gather(0, labels[None])[0]).max()
        segments = postprocess.panoptic(probs[i], masks[i], frame, things=things, **thresholds)
        found = postprocess.instances(probs[i], masks[i], frame, things=things, top_k=top_k)
        scores, share = _instances(found, theirs)
        kinds = [(s.id, s.label, s.isthing) for s in segments.segments]
        listed = [(s["id"], s["category_id"], s["isthing"]) for s in theirs["segments"]]
        other = torch.from_numpy(segments.labels) != theirs["panoptic"]
        moved = float(other.float().mean()) if kinds == listed else float("inf")
        measured.append((float(lost), moved, scores, share))
    names = {"semantic": ABSOLUTE, "panoptic": PIXELS, "instance scores": ABSOLUTE, "instance masks": PIXELS}
    for (name, tolerance), values in zip(names.items(), zip(*measured, strict=True), strict=True):
        yield Stage(name=f"answers{where}, {name}", difference=_worst(values), tolerance=tolerance)


def _things(recorded: Mapping[str, Any], classes: int) -> Tensor:
    """bool[K]: the recorded instances and segments say which classes are things; no other leaves a trace."""
    found = {int(c) for c in recorded["inst_classes"]}
    found |= {s["category_id"] for s in recorded["segments"] if s["isthing"]}
    return torch.tensor([c in found for c in range(classes)])


def _instances(found: postprocess.Instances, recorded: Mapping[str, Any]) -> tuple[float, float]:
    """The largest differences of scores, and of masks as a share of the pixels."""
    kept = recorded["inst_scores"] != 0  # ours leaves empty masks out
    scores = recorded["inst_scores"][kept].sort(descending=True).values
    if len(scores) != len(found.scores):
        return float("inf"), float("inf")
    apart = [0.0]
    ours, ours_labels = torch.from_numpy(found.masks), torch.from_numpy(found.labels)
    for mask, label in zip(recorded["inst_masks"][kept], recorded["inst_classes"][kept], strict=True):
        shares = (ours != mask.bool()).float().mean((1, 2))[ours_labels == label]
        apart.append(float(shares.min()) if len(shares) else float("inf"))
    return _largest([(torch.from_numpy(found.scores), scores)]), _worst(apart)


def _referring(run: _Run, where: str, similarity: Tensor, masks: Tensor) -> Stage:
    theirs = run.golden["grounding_eval_final_masks"] > 0  # logits
    ours = torch.from_numpy(postprocess.referring(similarity, masks, run.frame(0, theirs.shape[1:])))
    return Stage(
        name=f"answers{where}, referring", difference=float((ours != theirs).float().mean()), tolerance=PIXELS
    )


def _from_the_picture(run: _Run) -> Iterator[Stage]:
    """From pixels and words to answers, with nothing recorded in between."""
    golden, model = run.golden, run.model
    pixels = model.encode(*run.batch)
    run.follow("seg_eval_heads")
    final = run.ask(pixels, "segmentation", len(run.batch[0])).final
    whole, rows = final.with_image(), torch.arange(len(run.batch[0]))
    classes = F.normalize(model.text(golden["text", "input_ids"]).sentence, dim=-1)
    logits, masks = model.similarity(whole.semantic, classes), model.masks(whole, pixels, rows)
    yield _near("from the picture, class logits", logits, golden["seg_eval", "pred_logits"])
    yield _near("from the picture, masks", masks.sigmoid(), golden["seg_eval", "pred_masks"].sigmoid())
    yield from _segments(run, " from the picture", logits.softmax(-1), masks)
    yield _near("retrieval, decoder", final.image, golden["retrieval_eval", "image_embed_decoder"])
    yield _near(
        "retrieval, backbone", model.embed_pooled(pixels), golden["retrieval_eval", "image_embed_backbone"]
    )
    text, sentences = _phrases(run)
    run.follow("grounding_eval_heads")
    meant = run.ask(pixels, "referring", 1, text).final
    similarity = model.similarity(meant.semantic[0], sentences[0])
    yield _referring(run, " from the picture", similarity, model.masks(meant, pixels, rows[:1])[0])
    ids, steps = golden["captioning_infer", "tokens"], run.decoder["CAPTIONING", "STEP"]
    theirs = [detokenize(row[1 : steps + 1]) for row in ids.tolist()]
    run.follow("seg_eval_heads")
    ours = greedy(model, pixels, rows, torch.zeros(len(rows), model.config.width), steps)
    other = sum(a != b for a, b in zip(ours, theirs, strict=True))
    yield Stage(name="greedy captions that differ", difference=other, tolerance=0)
    region = golden["captioning_infer_masked", "mask"] == 0  # theirs says what is blocked
    theirs = [detokenize(row[1 : steps + 1]) for row in golden["captioning_infer_masked", "tokens"].tolist()]
    no_task = torch.zeros(len(region), model.config.width)
    ours = captions(model, pixels, rows[: len(region)], no_task, steps, GREEDY, region)
    other = sum(a != b for a, b in zip(ours, theirs, strict=True))
    yield Stage(name="greedy captions of a region that differ", difference=other, tolerance=0)


# ------------------------------------------------------------------------------------------------ training


# Our terms -> the original's.
TERMS = {
    "class_ce": "loss_mask_ce",
    "mask_bce": "loss_mask_bce",
    "mask_dice": "loss_mask_dice",
    "grounding_ce": "loss_grounding_ce",
    "grounding_bce": "loss_grounding_bce",
    "grounding_dice": "loss_grounding_dice",
    "captioning": "loss_captioning",
    "retrieval": "loss_retrieval_decoder",
    "retrieval_backbone": "loss_retrieval_backbone",
}
NOUNS = "loss_caption"


def _training(run: _Run) -> Iterator[Stage]:
    """The loss terms with the recorded draws, their weighted sum, and the gradient of every parameter."""
    golden, model = run.golden, run.model
    scene = _scene(run)
    terms = _terms(run, scene)
    run.follow("seg_train_heads")
    nouns, slope = _noun_loss(run, scene)
    every = [name for name in golden["seg_losses_unweighted"] if name.startswith(f"{TERMS['class_ce']}_")]
    with torch.no_grad():
        alone = [_terms(run, scene, layer) for layer in range(len(every))]
    recorded = golden["seg_losses_unweighted"] | golden["vlp_losses_unweighted"]
    for name in (*TERMS, NOUNS):
        wanted = _layers(recorded, TERMS.get(name, NOUNS))
        found = nouns if name == NOUNS else torch.stack([told.get(name, torch.zeros(())) for told in alone])
        said = "nouns (by formula)" if name == NOUNS else name
        yield _close(f"loss, {said}", F.pad(found, (0, len(wanted)))[: len(wanted)], wanted)
    yield _close("gradient, nouns by the meanings", slope, golden["grad_loss_caption_0_wrt_pred_captions"])
    whole = losses.total(terms, scene.config) + golden["weight_dict", f"{NOUNS}_0"] * nouns.sum()
    yield _close("loss, weighted sum", whole, golden["total_weighted_loss"])
    weights = [_layers(golden["weight_dict"], term) for term in (*TERMS.values(), NOUNS)]
    other = sum(int((layers != layers[0]).sum()) for layers in weights)
    yield Stage(name="loss, weights that differ between layers", difference=other, tolerance=0)
    model.zero_grad()
    whole.backward()
    apart: dict[str, list[float]] = {}
    for name, theirs in golden["grads"].items():  # by their names, since a bias of keys alone has no gradient
        for ours, part in translate({name: theirs}).items():
            gradient: Any = model.get_parameter(ours).grad
            missing = gradient is None or gradient.shape != part.shape
            difference = float("inf") if missing else float((gradient - part).norm() / theirs.norm())
            apart.setdefault(ours.split(".")[0], []).append(difference)
    untold = {name.split(".")[0] for name, _ in model.named_parameters()} - apart.keys()
    if untold:
        raise ValueError(f"no golden file of an X-Decoder: grads of {', '.join(sorted(untold))} are missing")
    for kind, differences in apart.items():
        if (
            kind != "text"
        ):  # which texts taught it is not recorded: class names, nouns and phrases are embeddings
            yield Stage(name=f"gradients, {kind}", difference=_worst(differences), tolerance=RELATIVE)


def _layers(recorded: Mapping[str, Any], name: str) -> Tensor:
    """What is recorded of each layer, the last one first; raises `ValueError` where that is nothing."""
    found = {int(k.rpartition("_")[2]): float(v) for k, v in recorded.items() if k.rpartition("_")[0] == name}
    if sorted(found) != list(range(len(found))) or not found:
        raise ValueError(f"no golden file of an X-Decoder: layers of {name} are missing")
    return torch.tensor([found[layer] for layer in range(len(found))])


def _terms(run: _Run, scene: losses.Scene, layer: int | None = None) -> losses.Terms:
    """Our terms but the noun loss: the sums over layers, or those of one, counted from the last."""
    run.layer = layer
    run.follow("seg_train_heads")
    terms = _segmentation(run, scene)
    if (layer or 0) < run.decoder["TOP_GROUNDING_LAYERS"]:
        terms |= _grounding(run, scene)
    run.follow("vlp_train_heads")
    terms |= _image_text(run, scene)
    run.layer = None
    return terms


def _scene(run: _Run) -> losses.Scene:
    width, decoder, weights = run.model.config.width, run.decoder, run.golden["weight_dict"]
    config = LossConfig(
        **{ours: weights[f"{theirs}_0"] for ours, theirs in TERMS.items()},
        no_object_weight=decoder["NO_OBJECT_WEIGHT"],
        points=decoder["TRAIN_NUM_POINTS"],
        oversample=decoder["OVERSAMPLE_RATIO"],
        importance=decoder["IMPORTANCE_SAMPLE_RATIO"],
        same_phrases=True,
    )
    return losses.Scene(
        model=run.model,
        pixels=run.model.encode(*run.batch),
        classes=run.golden["coco_text_emb"],
        answers=torch.zeros(0, width),
        tasks=torch.zeros(len(TASKS), width),
        config=config,
    )


def _top(scene: losses.Scene, layers: int) -> losses.Scene:
    return replace(scene, config=scene.config.model_copy(update={"top_layers": layers}))


def _work(task: Task, images: Sequence[int], targets: Targets) -> Work:
    return Work(kind=task, tasks=(task,) * len(images), images=torch.tensor(images), targets=targets)


def _segmentation(run: _Run, scene: losses.Scene) -> losses.Terms:
    truths = run.golden["seg_targets"]
    targets = MaskTargets(
        masks=pad_sequence([t["masks"].float() for t in truths], batch_first=True),
        labels=pad_sequence([t["labels"] for t in truths], batch_first=True, padding_value=-1),
        counts=tuple(len(t["labels"]) for t in truths),
        texts=torch.zeros(0, 2, dtype=torch.int64),
    )
    drawn, _ = run.draws
    nothing = _as_text(torch.zeros(0, 2, scene.classes.shape[1]))
    with _Drawn(torch.cat(layers) for layers in zip(*drawn, strict=True)):
        return losses.segmentation(scene, _work("panoptic", range(len(truths)), targets), nothing)


def _grounding(run: _Run, scene: losses.Scene) -> losses.Terms:
    """Picture by picture, because the original weighs pictures, and phrases more than class names."""
    scene, truths = _top(scene, run.decoder["TOP_GROUNDING_LAYERS"]), run.golden["seg_targets"]
    modes = {kind: run.decoder["GROUNDING", f"{kind.upper()}_WEIGHT"] for kind in ("text", "class")}
    tokens = run.golden["seg_grounding_tokens_padded"].transpose(0, 1)
    _, drawn = run.draws
    phrases, before = sum(len(t["grounding_hash"]) for t in truths), 0
    terms = {name: torch.zeros(()) for name in TERMS if name.startswith("grounding")}
    for i, truth in enumerate(truths):
        count = len(truth["grounding_hash"])
        # the first phrase carries the recorded token list of all of them
        read = torch.cat((tokens[i : i + 1], torch.zeros(count - 1, *tokens.shape[1:])))
        texts = replace(
            _as_text(read),
            ids=truth["grounding_hash"][:, None].expand(read.shape[:2]),
            sentence=truth["grounding_class_embs"],
            padding=torch.arange(count)[:, None].expand(read.shape[:2]) > 0,
        )
        targets = PhraseTargets(
            masks=truth["grounding_masks"][None].float(), counts=(count,), texts=texts.ids
        )
        places, masks = slice(i, i + 1), slice(before, before + count)
        parts = zip(zip(*drawn, strict=True), (places, masks, masks), strict=True)
        with _Drawn(torch.cat([numbers[part] for numbers in layers]) for layers, part in parts):
            found = losses.referring(scene, _work("referring", [i], targets), texts)
        shares = {"grounding_ce": modes[truth["grounding_task"]] / len(truths)}
        terms = {k: v + shares.get(k, count / phrases) * found[k] for k, v in terms.items()}
        before += count
    return terms


def _image_text(run: _Run, scene: losses.Scene) -> losses.Terms:
    ids = run.golden["vlp_in", "input_ids"]
    texts, targets = run.model.text(ids), CaptionTargets(texts=ids)
    terms: losses.Terms = {}
    kinds: tuple[tuple[Task, Any], ...] = (("captioning", losses.captioning), ("retrieval", losses.retrieval))
    for task, loss in kinds:
        top = run.decoder[f"TOP_{task.upper()}_LAYERS"]
        if (run.layer or 0) < top:
            terms |= loss(_top(scene, top), _work(task, range(len(ids)), targets), texts)
    return terms


def _noun_loss(run: _Run, scene: losses.Scene) -> tuple[Tensor, Tensor]:
    """The original's contrast of latents and nouns (X-Decoder, 3.5), with its recorded matches.

    Of each layer, the last one first. And the gradient of the last layer's by what its queries mean,
    float[R, O + Q, D]: of the image query and of the phrases' copies it is zero.
    """
    golden, layers = run.golden, []
    truths, matches = golden["seg_targets"], golden["seg_loss_matches"]
    of_classes, of_nouns = ([m for kind, m in matches if kind == k] for k in ("default", "caption_womask"))
    predictions = run.ask(scene.pixels, "segmentation", len(truths)).predictions
    for layer in range(run.decoder["TOP_CAPTION_LAYERS"]):
        rows, texts, names = [], [], []
        for i, truth in enumerate(truths):
            semantic = predictions[-1 - layer].semantic[i]
            (matched, targets), (noun_rows, nouns) = of_classes[layer][i], of_nouns[layer][i]
            rest = torch.tensor([q not in matched.tolist() for q in range(len(semantic))])
            # unmatched latents are normalised in place where no gradient is kept: they learn nothing
            rows += [semantic[rest][noun_rows].detach(), semantic[matched]]
            texts += [truth["captions"][nouns], scene.classes[truth["labels"][targets]]]
            names += [truth["captions_hash"][n] for n in nouns] + [truth["labels_hash"][t] for t in targets]
        distinct = {name: i for i, name in enumerate(dict.fromkeys(names))}
        wanted = torch.tensor([distinct[name] for name in names])
        first = [names.index(name) for name in distinct]
        logits = run.model.similarity(torch.cat(rows), torch.cat(texts)[first])
        shared = F.one_hot(wanted).T / F.one_hot(wanted).sum(0)[:, None]
        layers.append(0.7 * F.cross_entropy(logits, wanted) + 0.3 * F.cross_entropy(logits.T, shared))
    (slope,) = torch.autograd.grad(layers[0], predictions[-1].semantic, retain_graph=True)
    return torch.stack(layers), F.pad(slope, (0, 0, 0, run.queries))


Draws = tuple[Tensor, Tensor, Tensor]  # of a layer: for the matcher, candidates of points, fresh points


def _recorded_draws(run: _Run) -> tuple[list[Draws], list[Draws]]:
    """For segmentation and grounding, one a layer, in our order: first layer first."""
    pictures, place = len(run.golden["batched"]), 0
    segmentation: list[Draws] = []
    grounding: list[Draws] = []
    for layer in range(len(run.golden["seg_train_heads"])):  # theirs begins with the last layer
        for kind in [segmentation] + [grounding] * (layer < run.decoder["TOP_GROUNDING_LAYERS"]):
            drawn = [run.golden["seg_loss_rand_log", place + i] for i in range(pictures + 2)]
            kind.insert(0, (torch.cat(drawn[:pictures]), *drawn[pictures:]))
            place += pictures + 2
    return segmentation, grounding


class _Drawn(TorchFunctionMode):
    """Inside, `torch.rand` gives recorded draws, in order, all rows of one or some of them at a time.

    Raises `ValueError` where a shape does not fit.
    """

    def __init__(self, draws: Iterable[Tensor]) -> None:
        super().__init__()
        self.draws = list(draws)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.rand:
            return func(*args, **(kwargs or {}))
        recorded = self.draws.pop(0) if self.draws else torch.empty(0)
        drawn, rest = recorded[: args[0]], recorded[args[0] :]
        if drawn.shape != args:
            raise ValueError(
                f"seg_loss_rand_log: {list(args)} numbers are drawn, recorded are {list(recorded.shape)}"
            )
        if len(rest):
            self.draws.insert(0, rest)
        return drawn


def _as_text(tokens: Tensor) -> TextFeatures:
    """Tokens float[N, T, D] that are all read."""
    ids = torch.zeros(tokens.shape[:2], dtype=torch.int64)
    return TextFeatures(ids=ids, tokens=tokens, sentence=tokens[:, 0], padding=ids > 0)


def _near(name: str, ours: Tensor, theirs: Tensor) -> Stage:
    return Stage(name=name, difference=_largest([(ours, theirs)]), tolerance=ABSOLUTE)


def _close(name: str, ours: Tensor, theirs: Tensor) -> Stage:
    difference = _largest([(ours.detach(), theirs)]) / max(float(theirs.abs().max()), 1e-12)
    return Stage(name=name, difference=difference, tolerance=RELATIVE)


def _largest(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest absolute difference; infinite where shapes differ, NaN where anything is NaN."""
    return _worst([float("inf") if a.shape != b.shape else float((a - b).abs().max()) for a, b in pairs])


def _worst(values: Sequence[float]) -> float:
    """The largest; NaN where one is."""
    return float(torch.tensor(values, dtype=torch.float64).max())
