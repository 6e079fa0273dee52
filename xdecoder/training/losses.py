"""What the model is asked to get right: one function a kind of request, each returning named terms.

Every term is a plain number before its weight; `total` joins them by `LossConfig`, where a term without a
weight is an error. Predictions are supervised before the first layer and after every layer (deep
supervision); captioning, retrieval, VQA and grounding on the last `top_layers` of them.

Letters: `L` predictions, `R` requests, `O` latents, `M` target masks, `K` classes, `N` texts, `T` tokens, `D`
width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from schemas.jobs import LossConfig
from schemas.tasks import TASKS
from xdecoder.model.decoder import Outputs, Pixels, Prediction
from xdecoder.model.layers import product, unit
from xdecoder.model.text import TextFeatures
from xdecoder.model.xdecoder import MAX_SCALE, XDecoder
from xdecoder.prompts import END, PAD, VOCABULARY_SIZE
from xdecoder.training import joined
from xdecoder.training.batch import AnswerTargets, CaptionTargets, MaskTargets, PhraseTargets, Work
from xdecoder.training.matcher import (
    ALPHA,
    GAMMA,
    Pairs,
    Pixelwise,
    assign,
    match,
    match_fixed,
    sample_points,
)

Terms = dict[str, Tensor]
_MASKS_AT_ONCE = 16  # whose points are chosen and read: bounds memory, not results


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What the loss functions share: the encoded batch, and texts that are the same for every request.

    classes    what `XDecoder.class_logits` takes; answers float[A, D]
    tasks      float[7, D], the sentences behind the task tokens
    """

    model: XDecoder
    pixels: Pixels
    classes: Tensor
    answers: Tensor
    tasks: Tensor
    config: LossConfig


def total(terms: Mapping[str, Tensor], config: LossConfig) -> Tensor:
    """The weighted sum. Raises `ValueError` for a term that has no weight (the original drops it without a
    word).
    """
    missing = sorted(terms.keys() - LossConfig.model_fields.keys())
    if missing:
        raise ValueError(f"loss terms {missing} have no weight in LossConfig")
    return torch.stack([getattr(config, name) * value for name, value in terms.items()]).sum()


# ------------------------------------------------------------------------------------------------
# segmentation


def segmentation(scene: Scene, work: Work, texts: TextFeatures) -> Terms:
    """Semantic, instance and panoptic requests, by what the model's output is (`ModelConfig.output`)."""
    targets = work.targets
    assert isinstance(targets, MaskTargets)
    outputs = scene.model.ask(scene.pixels, "segmentation", work.images, _tasks(scene, work))
    return _OUTPUTS[scene.model.config.output](scene, work, targets, outputs, texts)


def _mask_classification(
    scene: Scene, work: Work, targets: MaskTargets, outputs: Outputs, texts: TextFeatures
) -> Terms:
    """Class, mask and query-text terms of (class, mask) pairs (MaskFormer, OneFormer)."""
    logits = scene.model.class_logits(_stack(outputs.predictions, "semantic"), scene.classes)
    pairs = _MATCHING[scene.config.matching](scene, work, logits, outputs.predictions, targets)
    last = scene.config.class_layers  # 0 leaves nothing out
    named = pairs[-last * len(work.images) :]
    terms = {"class_ce": class_loss(logits[-last:], targets.labels, named, scene.config.no_object_weight)}
    kind = scene.config.pixelwise
    drawn = _matched_masks(scene, outputs.predictions, work.images, pairs)
    terms[f"mask_{kind}"], terms["mask_dice"] = matched_losses(
        drawn, targets.masks, pairs, scene.config, kind, sum(targets.counts)
    )
    if scene.config.region_ce:
        terms["region_ce"] = _region_loss(scene, work, targets)
    if outputs.initial is not None:
        terms["query_text"] = _query_text(scene, outputs.initial, texts.sentence)
    return terms


def _by_features(
    scene: Scene, work: Work, targets: MaskTargets, outputs: Outputs, texts: TextFeatures
) -> Terms:
    """One classification of every pixel: the decoder's layers have no say in it."""
    return {"pixel_ce": _pixel_ce(scene, work, targets, outputs.predictions[-1:])}


def _by_latents(
    scene: Scene, work: Work, targets: MaskTargets, outputs: Outputs, texts: TextFeatures
) -> Terms:
    """One after every layer (MaskFormer, 2.2), and before the first where there is no other."""
    return {"pixel_ce": _pixel_ce(scene, work, targets, outputs.predictions[1:] or outputs.predictions)}


_OUTPUTS: Mapping[str, Callable[[Scene, Work, MaskTargets, Outputs, TextFeatures], Terms]] = {
    "masks": _mask_classification,
    "pixels": _by_features,
    "latents": _by_latents,
}


def _pixel_ce(scene: Scene, work: Work, targets: MaskTargets, predictions: Sequence[Prediction]) -> Tensor:
    truth = label_map(targets)
    every = [scene.model.pixel_logits(p, scene.pixels, work.images, scene.classes) for p in predictions]
    return torch.stack([pixel_loss(logits, truth) for logits in every]).sum()


def label_map(targets: MaskTargets) -> Tensor:
    """The class of each pixel, int64[R, H, W]; -1 where no mask lies."""
    if not targets.masks.shape[1]:
        return torch.full_like(targets.masks.sum(1), -1, dtype=torch.int64)
    covered, owner = targets.masks.max(1)
    labels = targets.labels[:, :, None].expand(-1, -1, owner[0].numel()).gather(1, owner.flatten(1)[:, None])
    return torch.where(covered > 0, labels[:, 0].unflatten(1, owner.shape[1:]), -1)


def pixel_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean cross-entropy of all labelled pixels: float[R, K, h, w], resized, against int64[R, H, W].

    -1 is no label; without any the loss is zero and connected to the graph.
    """
    large = F.interpolate(logits.float(), size=truth.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(large, truth, ignore_index=-1, reduction="sum")
    return total / joined.number((truth >= 0).sum(), truth.device)


def class_loss(logits: Tensor, labels: Tensor, pairs: Pairs, no_object: float) -> Tensor:
    """Weighted cross-entropy over K classes and no-object, summed over predictions.

    logits   float[L, R, O, K + 1]; labels int64[R, M]; pairs from `match`; unmatched latents want the last
    column, which weighs `no_object`; the mean divides by the sum of weights, as PyTorch's does, over all
    ranks
    """
    layers, rows, _, columns = logits.shape
    wanted = torch.full(logits.shape[:3], columns - 1, device=logits.device)
    for i, (queries, targets) in enumerate(pairs):
        wanted[i // rows, i % rows, queries] = labels[i % rows, targets]
    weight = torch.ones(columns, device=logits.device)
    weight[-1] = no_object
    tiny = torch.finfo(weight.dtype).tiny
    own = weight[wanted[0]].sum()  # the same for every layer: each matches as many
    share = own / joined.number(own, own.device, least=tiny)
    if not rows:
        return logits.sum() * 0
    weight = weight.clamp(min=tiny)  # without a target, and no weight for no-object, the mean is 0 / 0
    losses = [F.cross_entropy(logits[i].flatten(0, 1), wanted[i].flatten(), weight) for i in range(layers)]
    return torch.stack(losses).sum() * share


def _region_loss(scene: Scene, work: Work, targets: MaskTargets) -> Tensor:
    """Cross-entropy of the true regions' names by mask pooling, the mean over the regions of all ranks."""
    meaning = scene.model.decoder.name_regions(scene.pixels, work.images, targets.masks)
    logits = scene.model.class_logits(meaning, scene.classes)
    real = (targets.labels >= 0) & targets.masks.flatten(2).any(-1)
    number = joined.number(real.sum(), real.device)
    return F.cross_entropy(logits[real], targets.labels[real], reduction="sum") / number


def mask_losses(
    logits: Tensor,
    truth: Tensor,
    pairs: Pairs,
    config: LossConfig,
    pixelwise: Pixelwise = "bce",
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A pixelwise loss and dice of the matched masks, summed over masks and predictions.

    logits float[L, R, O, h, w], truth float[R, M, H, W]. On points of the mask, or on every pixel of the
    truth where `config.points` is 0. Divided by `count` masks of all ranks, at least one, over the number of
    ranks: by default as many as one prediction matches, which are fewer than the targets where these
    outnumber the latents. Without a match both are zero and connected to the graph.
    """
    layer, row, query, _ = matched(pairs, len(truth)).to(logits.device).unbind(1)
    return matched_losses(logits[layer, row, query], truth, pairs, config, pixelwise, count)


def matched(pairs: Pairs, rows: int) -> Tensor:
    """Prediction, request, latent and target of every match, int64[n, 4], on the host."""
    found = [
        (i // rows, i % rows, q, t) for i, (qs, ts) in enumerate(pairs) for q, t in zip(qs, ts, strict=True)
    ]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 4)


def matched_losses(
    logits: Tensor,
    truth: Tensor,
    pairs: Pairs,
    config: LossConfig,
    pixelwise: Pixelwise,
    count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `mask_losses`, of the logits float[n, h, w] of the matched masks, in the order of `matched`."""
    rows = len(truth)
    if count is None:
        count = sum(len(q) for q, _ in pairs[-rows:]) if rows else 0
    number = joined.number(count, logits.device)
    if not len(logits):
        zero = logits.sum() * 0
        return zero, zero
    _, row, _, target = matched(pairs, rows).to(logits.device).unbind(1)
    predicted = logits[:, None].float()
    whole = [predicted, row, target] + ([uncertain_points(predicted, config)] if config.points else [])
    each, dice = [], []
    for maps, r, t, *places in zip(*(part.split(_MASKS_AT_ONCE) for part in whole), strict=True):
        x, y = _beside(maps, truth[r, t][:, None], *places)
        p = x.sigmoid()
        each.append(_PIXELWISE[pixelwise](x, y).mean(1))
        dice.append(1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1))
    return torch.cat(each).sum() / number, torch.cat(dice).sum() / number


def _beside(logits: Tensor, truth: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """At these places, else everywhere: float[n, 1, h, w] and float[n, 1, H, W] -> two float[n, P]."""
    if places is not None:
        return sample_points(logits, places)[:, 0], sample_points(truth, places)[:, 0]
    large = F.interpolate(logits, size=truth.shape[-2:], mode="bilinear", align_corners=False)
    return large.flatten(1), truth.flatten(1)


def _binary(logits: Tensor, truth: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def _focal(logits: Tensor, truth: Tensor) -> Tensor:
    """a_t (1 - p_t)^g (-log p_t), where x_t is x for a target of one and 1 - x for zero (RetinaNet)."""
    p = logits.sigmoid()
    unsure = (1 - p) * truth + p * (1 - truth)  # 1 - p_t, also between zero and one as p_t is linear in t
    return (ALPHA * truth + (1 - ALPHA) * (1 - truth)) * unsure**GAMMA * _binary(logits, truth)


_PIXELWISE: Mapping[Pixelwise, Callable[[Tensor, Tensor], Tensor]] = {"bce": _binary, "focal": _focal}


@torch.no_grad()
def uncertain_points(logits: Tensor, config: LossConfig) -> Tensor:
    """Where to look at each mask: float[N, 1, h, w] -> float[N, P, 2] in [0, 1].

    Of oversample x P uniform points the importance x P with the smallest |logit|, then fresh uniform ones
    (PointRend).
    """
    count, certain = len(logits), round(config.importance * config.points)
    kept = []
    for maps in logits.split(_MASKS_AT_ONCE):
        places = torch.rand(len(maps), round(config.oversample * config.points), 2, device=logits.device)
        doubt = -sample_points(maps, places)[:, 0].abs()
        best = doubt.topk(certain, 1, sorted=False).indices[..., None]
        kept.append(places.gather(1, best.expand(-1, -1, 2)))
    return torch.cat(
        (torch.cat(kept), torch.rand(count, config.points - certain, 2, device=logits.device)), 1
    )


def _query_text(scene: Scene, initial: Tensor, sentences: Tensor) -> Tensor:
    """OneFormer's contrast between an image's queries float[R, Q, D] and its list of sentences, once."""
    model = scene.model
    contexts = model.query_text_context.weight.expand(len(initial), -1, -1)
    count = initial.shape[1] - contexts.shape[1]
    texts = model.query_text_mlp(sentences).view(len(initial), count, initial.shape[2])
    return query_text_loss(initial, torch.cat((texts, contexts), 1), model.query_text_scale)


def query_text_loss(queries: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """One vector an image: float[R, Q, D] both are flattened, normalised and contrasted over all ranks'
    images.

    Cross-entropy of rows plus that of columns, no half (OneFormer, 1.8); zero for a single image in all.
    """
    scale = log_scale.exp().clamp(max=MAX_SCALE)
    q, t = (unit(x.flatten(1)) for x in (queries, texts))
    return 2 * _contrast(q, t, scale)


# ------------------------------------------------------------------------------------------------ referring


def referring(scene: Scene, work: Work, texts: TextFeatures) -> Terms:
    """Phrases of an image against its latents: one-directional contrast and masks (X-Decoder, 3.9)."""
    targets = work.targets
    assert isinstance(targets, PhraseTargets)
    same = equal_phrases(texts.ids, targets.counts) if scene.config.same_phrases else None
    if same:  # a phrase that stands before is not read again
        again = torch.cat([rows.tril(-1).any(1) for rows in same])
        texts = replace(texts, padding=texts.padding | again[:, None])
    text, sentences = pack(texts, targets.counts)
    outputs = scene.model.ask(scene.pixels, "referring", work.images, _tasks(scene, work), text)
    top = outputs.predictions[-scene.config.top_layers :]
    logits = scene.model.similarity(_stack(top, "semantic"), sentences)
    costs = -logits.detach().softmax(2)
    pairs = _match(scene, costs, top, work.images, targets.masks, targets.counts)
    terms = {"grounding_ce": grounding_loss(logits, pairs, same)}
    drawn = _matched_masks(scene, top, work.images, pairs)
    terms["grounding_bce"], terms["grounding_dice"] = matched_losses(
        drawn, targets.masks, pairs, scene.config, "bce"
    )
    return terms


def pack(phrases: TextFeatures, counts: Sequence[int]) -> tuple[TextFeatures, Tensor]:
    """N phrases, counts[r] of them for request r -> one token list a request, and sentences float[R, M, D].

    The tokens of a request's phrases stand side by side without padding between them.
    """
    if not counts:
        return phrases, phrases.sentence[:, None][:, :0]
    keep = ~phrases.padding
    tokens, ids, sentences = [], [], []
    for start, count in zip(np.cumsum([0, *counts[:-1]]), counts, strict=True):
        part = slice(int(start), int(start) + count)
        tokens.append(phrases.tokens[part][keep[part]])
        ids.append(phrases.ids[part][keep[part]])
        sentences.append(phrases.sentence[part])
    padded = pad_sequence(ids, batch_first=True, padding_value=PAD)
    lengths = torch.tensor([len(i) for i in ids], device=padded.device)
    text = TextFeatures(
        ids=padded,
        tokens=pad_sequence(tokens, batch_first=True),
        sentence=phrases.sentence[:0],
        padding=torch.arange(padded.shape[1], device=padded.device) >= lengths[:, None],
    )
    return text, pad_sequence(sentences, batch_first=True)


def equal_phrases(ids: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Which phrases of a request have equal words: int64[N, T], counts[r] of them for r -> bool[M_r, M_r]."""
    return [(part[:, None] == part).all(-1) for part in ids.split(list(counts))]


def grounding_loss(logits: Tensor, pairs: Pairs, same: Sequence[Tensor] | None = None) -> Tensor:
    """For every phrase, cross-entropy over the latents: float[L, R, O, M]; mean over the phrases of all
    ranks, summed over predictions.

    same    from `equal_phrases`: such phrases want all latents that any of them is matched to, in equal parts
    """
    layers, rows = logits.shape[:2]
    number = joined.number(sum(len(q) for q, _ in pairs[:rows]), logits.device)
    terms = []
    for layer in range(layers):
        losses = []
        for row in range(rows):
            queries, targets = pairs[layer * rows + row]
            wanted = torch.as_tensor(queries, device=logits.device)
            if same is not None:
                equal = same[row][targets][:, targets].to(logits)
                wanted = equal @ F.one_hot(wanted, logits.shape[2]).to(logits) / equal.sum(1, keepdim=True)
            losses.append(F.cross_entropy(logits[layer, row, :, targets].T, wanted, reduction="none"))
        every = torch.cat((logits[layer].flatten()[:0], *losses))
        terms.append(every.sum() / number)
    return torch.stack(terms).sum()


# ------------------------------------------------------------------------------------------------ image and
# text


def retrieval(scene: Scene, work: Work, texts: TextFeatures) -> Terms:
    """Pictures against captions, by the decoder's image query and by the backbone (X-Decoder, 3.7 and
    3.8); and latents against what the captions speak of (3.5), where that has a weight.
    """
    assert isinstance(work.targets, CaptionTargets)
    outputs = scene.model.ask(scene.pixels, "segmentation", work.images, _tasks(scene, work))
    top = outputs.predictions[-scene.config.top_layers :]
    whole, nouns = texts.rows(slice(len(work.images))), texts.rows(slice(len(work.images), None))
    scale, captions = scene.model.scale(), unit(whole.sentence)
    decoder = [
        _contrast(unit(p.image), captions, scale) + 0.5 * fine_contrast(p.semantic, whole, scale) for p in top
    ]
    pooled = unit(scene.model.embed_pooled(scene.pixels)[work.images])
    terms = {
        "retrieval": torch.stack(decoder).sum(),
        "retrieval_backbone": _contrast(pooled, captions, scale),
    }
    if scene.config.nouns:
        terms["nouns"] = noun_loss(scene, _stack(top, "semantic"), nouns, work.targets.counts)
    return terms


def noun_loss(scene: Scene, latents: Tensor, nouns: TextFeatures, counts: Sequence[int]) -> Tensor:
    """Latents float[L, R, O, D] against the phrases of captions, counts[r] of them for request r -> a number.

    What the noun loss of X-Decoder (3.5) means to be: every phrase is matched to a latent by meaning alone,
    and the pairs of all ranks are contrasted, equal phrases as one: 0.7 of the cross-entropy of a latent
    among the phrases, 0.3 of that of a phrase among the latents, shared by all that are matched to it. Ours:
    latents learn, which the original's do not; and one that means no object is matched late, so that names
    go to latents that carry a mask. How likely a latent and a phrase are is their share among the latents
    times that among the phrases of the picture (dual softmax): as one picture decides it alone, many ranks
    decide as one.
    """
    with torch.no_grad():
        something = 1 - scene.model.class_logits(latents, scene.classes).softmax(-1)[..., -1:]
        rows = nouns.sentence.split([*counts, 0])  # at least one, as padding wants it
        own = pad_sequence(list(rows), batch_first=True)[: len(counts)]  # float[R, M, D]
        similar = scene.model.similarity(latents, own)
        number = torch.tensor(counts, device=own.device)[:, None]
        absent = torch.arange(own.shape[1], device=own.device) >= number
        among_phrases = similar.masked_fill(absent[:, None], -torch.inf).softmax(3).nan_to_num()
        likely = something * similar.softmax(2) * among_phrases
    pairs = assign(-likely.flatten(0, 1), list(counts) * len(latents))
    where = matched(pairs, len(counts))
    where[:, 3] += torch.tensor([0, *counts]).cumsum(0)[where[:, 1]]
    parts = [where[where[:, 0] == layer].to(latents.device) for layer in range(len(latents))]
    found = [_noun_loss(scene, x, nouns, part) for x, part in zip(latents, parts, strict=True)]
    return torch.stack(found).sum()


def _noun_loss(scene: Scene, latents: Tensor, nouns: TextFeatures, where: Tensor) -> Tensor:
    """Of one prediction, float[R, O, D]; `where` as from `matched`, but phrases counted over all requests."""
    _, row, query, noun = where.unbind(1)
    ids = F.pad(nouns.ids[noun], (0, scene.model.config.context - nouns.ids.shape[1]))
    handed = torch.cat((unit(latents[row, query]), unit(nouns.sentence[noun]), ids.float()), 1)
    widths = (latents.shape[-1], nouns.sentence.shape[-1], ids.shape[1])
    named, sentences, words = joined.gather(joined.parts(handed))[0].split(widths, 1)
    distinct, wanted = words.unique(dim=0, return_inverse=True)
    if not len(distinct):
        return named.sum() * 0
    shared = F.one_hot(wanted).T.float()  # [phrases, pairs]
    logits = product(joined.fixed(scene.model.scale()) * named, sentences[shared.argmax(1)].T)
    of_latents = F.cross_entropy(logits, wanted)
    of_phrases = F.cross_entropy(logits.T, shared / shared.sum(1, keepdim=True))
    return joined.once(0.7 * of_latents + 0.3 * of_phrases)


def fine_contrast(latents: Tensor, captions: TextFeatures, scale: Tensor) -> Tensor:
    """Latents against single tokens of all ranks' captions: float[R, O, D] and R captions -> a number.

    A token's share of its picture's target grows linearly with its place (X-Decoder, 3.7 B).
    """
    keep = ~captions.padding
    place = torch.arange(1, keep.shape[1] + 1, device=keep.device) * keep
    share = joined.parts((place / place.sum(1, keepdim=True))[keep])
    lengths = joined.parts(keep.sum(1))
    tokens = joined.parts(unit(captions.tokens[keep]))
    pictures = joined.parts(unit(latents).mean(1))  # the mean of cosines is one product
    (every_picture, picture), (every_token, token) = joined.gather(pictures), joined.gather(tokens)
    owner = torch.arange(len(lengths), device=keep.device).repeat_interleave(lengths)
    here = torch.arange(len(owner), device=keep.device)
    scale = joined.fixed(scale)
    rows = product(scale * pictures, every_token.T)
    columns = product(scale * every_picture, tokens.T) if joined.world() > 1 else rows
    to_tokens = -(rows.log_softmax(1)[owner, here + token] * share).sum()
    to_images = -(columns.log_softmax(0)[owner + picture, here] * share).sum()
    to_tokens = to_tokens * joined.world() / max(1, len(every_picture))
    to_images = to_images * joined.world() / max(1, len(every_token))
    return joined.once(0.7 * to_tokens + 0.3 * to_images)


def captioning(scene: Scene, work: Work, texts: TextFeatures) -> Terms:
    """Slot i predicts token i + 1, up to and with the end mark (X-Decoder, 3.6)."""
    outputs = scene.model.ask(scene.pixels, "captioning", work.images, _tasks(scene, work), texts)
    keep = ~texts.padding[:, 1:]  # padding never meets the vocabulary
    wanted = texts.ids[:, 1:][keep]
    rivals, places, counts = candidates(wanted, scene.config.caption_negatives)
    number = joined.number(keep.sum(), keep.device) + 1 / joined.world()  # one more than there are words
    losses = []
    for prediction in outputs.predictions[-scene.config.top_layers :]:
        assert prediction.text is not None
        logits = scene.model.caption_logits(prediction.text[:, :-1][keep], rivals) + counts
        losses.append(F.cross_entropy(logits, places, reduction="sum") / number)
    return {"captioning": torch.stack(losses).sum()}


def candidates(wanted: Tensor, negatives: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """The tokens that a caption's softmax is taken over: all, or those wanted and `negatives` drawn ones.

    A drawn token stands for its share of all tokens that nobody wants, by the logarithm of their number
    (Jean et al. 2015, with a uniform draw): the expected denominator is the whole vocabulary's.

    wanted     int64[N]
    returns    tokens int64[C] (None is the whole vocabulary), the places int64[N] of `wanted` among them, and
               float[C] to add to their logits
    """
    if not negatives:
        return None, wanted, torch.zeros(1, device=wanted.device)
    own, places = wanted.unique(return_inverse=True)
    drawn = torch.randint(VOCABULARY_SIZE, (negatives,), device=wanted.device)
    drawn = drawn[~torch.isin(drawn, own)]
    share = (VOCABULARY_SIZE - len(own)) / max(1, len(drawn))
    counts = torch.tensor([1.0, share], device=wanted.device).repeat_interleave(
        torch.tensor([len(own), len(drawn)], device=wanted.device)
    )
    return torch.cat((own, drawn)), places, counts.log()


def vqa(scene: Scene, work: Work, texts: TextFeatures) -> Terms:
    """The question's end slot against the texts of the answer list, soft targets by share of people."""
    targets = work.targets
    assert isinstance(targets, AnswerTargets)
    outputs = scene.model.ask(scene.pixels, "vqa", work.images, _tasks(scene, work), texts)
    number = joined.number(len(work.images), work.images.device)
    losses = [
        F.cross_entropy(answer_logits(scene.model, p, texts, scene.answers), targets.answers, reduction="sum")
        / number
        for p in outputs.predictions[-scene.config.top_layers :]
    ]
    return {"vqa": torch.stack(losses).sum()}


def answer_logits(
    model: XDecoder, prediction: Prediction, questions: TextFeatures, answers: Tensor
) -> Tensor:
    """float[R, A]: the meaning of each question's last slot against the answers' texts float[A, D]."""
    assert prediction.text is not None
    end = (questions.ids == END).int().argmax(1)
    slot = prediction.text[torch.arange(len(end), device=end.device), end]
    return model.similarity(model.decoder.class_embed(slot), answers)


# ------------------------------------------------------------------------------------------------ small
# pieces


def _contrast(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit float[R, D] pairs over all ranks, the mean of both directions.

    Each rank averages its own rows against everybody's; the gather passes gradients, so averaging them over
    ranks gives the gradient of the joined batch (the original's is divided by the world size once more).
    """
    a, b, scale = joined.parts(a), joined.parts(b), joined.fixed(scale)
    (everyone_a, first), (everyone_b, _) = joined.gather(a), joined.gather(b)
    wanted = torch.arange(len(a), device=a.device) + first
    both = (product(scale * a, everyone_b.T), product(scale * b, everyone_a.T))
    rows = torch.stack([F.cross_entropy(logits, wanted, reduction="sum") for logits in both]).sum()
    # ranks may hold unequal rows, or none: rows weigh alike, not ranks
    return joined.once(rows / 2 * joined.world() / max(1, len(everyone_a)))


def _tasks(scene: Scene, work: Work) -> Tensor:
    """The sentence of each request's task, float[R, D]."""
    return scene.tasks[[TASKS.index(task) for task in work.tasks]]


def _stack(predictions: Sequence[Prediction], field: str) -> Tensor:
    return torch.stack([getattr(p, field) for p in predictions])


def _matched_masks(scene: Scene, predictions: Sequence[Prediction], images: Tensor, pairs: Pairs) -> Tensor:
    """Logits float[n, h, w] of the matched masks, in the order of `matched`: of all others none is taught."""
    where = matched(pairs, len(images))
    order = where[:, 1].argsort(stable=True)  # by request: one product with the features of each
    layer, row, query, _ = where[order].to(images.device).unbind(1)
    embeds = _stack(predictions, "mask_embed")[layer, row, query]
    features = scene.pixels.mask_features.index_select(0, images)
    counts = where[:, 1].bincount(minlength=len(images)).tolist()
    masks = [e @ f for e, f in zip(embeds.split(counts), features.flatten(2), strict=True)]
    size = features.shape[-2:]
    none = embeds.sum() * features[:0].flatten(2).sum(1)  # connected to the graph also where nothing matches
    every = torch.cat((none, *masks))
    return every[order.argsort().to(images.device)].unflatten(1, size)


def _match(
    scene: Scene,
    class_costs: Tensor,
    predictions: Sequence[Prediction],
    images: Tensor,
    truth: Tensor,
    counts: Sequence[int],
) -> Pairs:
    config, kind = scene.config, scene.config.pixelwise
    weights = (config.class_ce, getattr(config, f"mask_{kind}"), config.mask_dice)
    with torch.no_grad():
        features = scene.pixels.mask_features.index_select(0, images)
        masks = torch.einsum("lrod,rdhw->lrhwo", _stack(predictions, "mask_embed"), features)
        masks = masks.movedim(-1, 2)  # the order that the matcher reads fastest
    return match(class_costs, masks, truth, list(counts), weights, config.points, kind)


def _by_cost(
    scene: Scene, work: Work, logits: Tensor, predictions: Sequence[Prediction], targets: MaskTargets
) -> Pairs:
    labels = targets.labels.clamp(min=0)[None, :, None].expand(*logits.shape[:3], -1)
    costs = -logits.detach().softmax(-1).gather(-1, labels)
    return _match(scene, costs, predictions, work.images, targets.masks, targets.counts)


def _by_class(
    scene: Scene, work: Work, logits: Tensor, predictions: Sequence[Prediction], targets: MaskTargets
) -> Pairs:
    return match_fixed(targets.labels, targets.counts, logits.shape[2], len(logits))


_MATCHING: Mapping[str, Callable[[Scene, Work, Tensor, Sequence[Prediction], MaskTargets], Pairs]] = {
    "bipartite": _by_cost,
    "fixed": _by_class,
}
