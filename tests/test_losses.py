"""Laws of the losses: equal to their formulas written out, silent where there is nothing to learn, and on two
ranks the same as on one.
"""

import datetime
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from tiny import MODEL, VOCABULARY, bare, model, samples, train_config
from torch import Tensor, nn
from torch.nn import functional as F

from schemas.jobs import LossConfig
from schemas.tasks import STREAM_FIELDS, TASKS
from xdecoder.model.text import TextFeatures
from xdecoder.model.xdecoder import ClassTexts, XDecoder
from xdecoder.prompts import VOCABULARY_SIZE, tokenize
from xdecoder.tasks import BatchMaker, Setting
from xdecoder.training import losses
from xdecoder.training.batch import Batch, MaskTargets, Work, pad_masks
from xdecoder.training.losses import Scene
from xdecoder.training.matcher import sample_points
from xdecoder.training.trainer import Objective

Pairs = list[tuple[np.ndarray, np.ndarray]]
LOSS = LossConfig(points=64, region_ce=1, nouns=1)


def pair(queries: list[int], targets: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(queries, dtype=np.int64), np.array(targets, dtype=np.int64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def features(ids: Tensor, seed: int = 0) -> TextFeatures:
    """Random texts of given lengths: `ids` as the tokenizer pads them."""
    of = model(seed).text
    with torch.no_grad():
        return of(ids)


# ------------------------------------------------------------------------------------------- the sum


def test_the_total_is_the_weighted_sum() -> None:
    terms = {"class_ce": torch.tensor(1.5), "retrieval_backbone": torch.tensor(0.25)}
    assert losses.total(terms, LossConfig(class_ce=3, retrieval_backbone=8)).item() == 3 * 1.5 + 8 * 0.25


def test_a_term_without_a_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\['noun'\] have no weight"):
        losses.total({"class_ce": torch.tensor(1.0), "noun": torch.tensor(1.0)}, LossConfig())


# ------------------------------------------------------------------------------------------- classes


def test_class_loss_equals_its_formula() -> None:
    logits, labels = noise(2, 2, 4, 4), torch.tensor([[2, 0], [1, -1]])  # three classes and background
    pairs = [pair([3, 1], [0, 1]), pair([0], [0]), pair([0, 2], [1, 0]), pair([3], [0])]
    wanted = [[[3, 0, 3, 2], [1, 3, 3, 3]], [[0, 3, 2, 3], [3, 3, 3, 1]]]
    expected = 0.0
    for layer in range(2):
        above = below = 0.0
        for row in range(2):
            for query in range(4):
                target = wanted[layer][row][query]
                weight = 0.1 if target == 3 else 1.0
                above -= weight * float(logits[layer, row, query].log_softmax(0)[target])
                below += weight
        expected += above / below
    assert losses.class_loss(logits, labels, pairs, 0.1).item() == pytest.approx(expected, rel=1e-5)


def terms_of(of: XDecoder, batch: Batch, **loss: object) -> losses.Terms:
    torch.manual_seed(3)  # the points of the matcher
    (work,) = batch.works
    return losses.segmentation(scene_of(of, batch, **loss), work, of.text(work.targets.texts))


def test_names_can_be_learnt_from_the_last_predictions_alone() -> None:
    of, batch = model(), batch_of("panoptic")
    last, two, every, more = (terms_of(of, batch, class_layers=n)["class_ce"].item() for n in (1, 2, 0, 9))
    assert 0 < last < two < every == more  # a prediction before the first layer and after each of two
    gradients = torch.autograd.grad(
        terms_of(of, batch, class_layers=1)["class_ce"], list(of.parameters()), allow_unused=True
    )
    assert all(g is None or torch.isfinite(g).all() for g in gradients)


def test_region_loss_equals_its_formula() -> None:
    of, batch = model(), batch_of("panoptic")
    (work,) = batch.works
    assert isinstance(work.targets, MaskTargets)
    scene = scene_of(of, batch)
    level, pooling = scene.pixels.levels[-1], of.decoder.pooling
    assert pooling is not None
    expected = []
    for row, image in enumerate(work.images.tolist()):
        for mask, label in zip(work.targets.masks[row], work.targets.labels[row].tolist(), strict=True):
            if label < 0:
                continue
            height, width = level.grid
            cells = mask.unflatten(0, (height, -1)).unflatten(2, (width, -1)).mean((1, 3)).flatten()
            looks = pooling.norm(pooling.project((cells / cells.sum()) @ level.memory[image]))
            logits = of.similarity(of.decoder.class_embed(looks), scene.classes)
            expected.append(-logits.log_softmax(0)[label].item())
    assert len(expected) == sum(work.targets.counts) > 4
    assert terms_of(of, batch)["region_ce"].item() == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_model_without_mask_pooling_learns_as_in_the_papers() -> None:
    of, batch = model(mask_pooling=False), batch_of("panoptic")
    assert set(terms_of(of, batch, region_ce=0)) == {"class_ce", "mask_bce", "mask_dice", "query_text"}
    with pytest.raises(RuntimeError, match="mask_pooling is off"):
        terms_of(of, batch, region_ce=1)


# --------------------------------------------------------------------------------------------- masks

POINTS = LossConfig(points=40, oversample=3, importance=0.75)


def test_mask_losses_equal_their_formulas() -> None:
    logits, truth = 3 * noise(2, 2, 3, 8, 8), (noise(2, 2, 16, 16, seed=1) > 0).float()
    pairs = [pair([2, 0], [0, 1]), pair([1], [0]), pair([1, 0], [0, 1]), pair([1], [0])]
    torch.manual_seed(5)
    bce, dice = losses.mask_losses(logits, truth, pairs, POINTS)

    matched = [(0, 0, 2, 0), (0, 0, 0, 1), (0, 1, 1, 0), (1, 0, 1, 0), (1, 0, 0, 1), (1, 1, 1, 0)]
    predicted = torch.stack([logits[layer, r, q] for layer, r, q, _ in matched])[:, None]
    torch.manual_seed(5)
    places = losses.uncertain_points(predicted, POINTS)
    expected_bce = expected_dice = 0.0
    for (_, row, _, target), mask, points in zip(matched, predicted, places, strict=True):
        p = sample_points(mask[None], points[None])[0, 0].sigmoid().double()
        t = sample_points(truth[row, target][None, None], points[None])[0, 0].double()
        expected_bce += float(-(t * p.log() + (1 - t) * (1 - p).log()).mean())
        expected_dice += float(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    assert bce.item() == pytest.approx(expected_bce / 3, rel=1e-4)  # three masks in the two requests
    assert dice.item() == pytest.approx(expected_dice / 3, rel=1e-4)


def test_focal_and_dice_on_whole_masks_equal_their_formulas() -> None:
    """MaskFormer, 2.2: predictions resized to the truth, every pixel counts, no random number is drawn."""
    logits, truth = 3 * noise(2, 1, 3, 4, 4), (noise(1, 2, 8, 8, seed=1) > 0).float()
    pairs = [pair([2, 0], [0, 1]), pair([1], [0])]
    state = torch.get_rng_state()
    focal, dice = losses.mask_losses(logits, truth, pairs, LossConfig(points=0), "focal")
    assert torch.equal(state, torch.get_rng_state())
    expected_focal = expected_dice = 0.0
    for layer, query, target in ((0, 2, 0), (0, 0, 1), (1, 1, 0)):
        large = F.interpolate(logits[layer, :, query : query + 1], size=(8, 8), mode="bilinear")
        p, t = large.double().sigmoid().flatten(), truth[0, target].flatten()
        right = torch.where(t == 1, p, 1 - p)
        share = torch.where(t == 1, 0.25, 0.75)
        expected_focal += float((-share * (1 - right) ** 2 * right.log()).mean())
        expected_dice += float(1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    assert focal.item() == pytest.approx(expected_focal, abs=1e-6)  # one mask in the last prediction
    assert dice.item() == pytest.approx(expected_dice, abs=1e-6)


def test_cross_entropy_on_whole_masks_equals_its_formula() -> None:
    logits, truth = 3 * noise(1, 1, 2, 8, 8), (noise(1, 1, 8, 8, seed=1) > 0).float()
    bce, _ = losses.mask_losses(logits, truth, [pair([1], [0])], LossConfig(points=0))
    p, t = logits[0, 0, 1].double().sigmoid(), truth[0, 0]
    assert bce.item() == pytest.approx(float(-(t * p.log() + (1 - t) * (1 - p).log()).mean()), abs=1e-6)


def test_the_two_pixelwise_losses_are_alternatives() -> None:
    with pytest.raises(ValueError, match="set the weight of one to 0"):
        LossConfig(mask_focal=20)
    of, batch = model(), batch_of("semantic")
    terms = terms_of(of, batch, mask_bce=0, mask_focal=20, mask_dice=1, points=0)
    assert set(terms) == {"class_ce", "region_ce", "mask_focal", "mask_dice", "query_text"}
    config = LossConfig(mask_bce=0, mask_focal=20, mask_dice=1, region_ce=1)
    assert losses.total(terms, config).isfinite()


def test_fixed_matching_teaches_each_latent_its_class() -> None:
    of, batch = model(), batch_of("semantic")
    (work,) = batch.works
    assert isinstance(work.targets, MaskTargets)
    scene = scene_of(of, batch)
    predictions = of.ask(scene.pixels, "segmentation", work.images, losses._tasks(scene, work)).predictions
    logits = of.similarity(torch.stack([p.semantic for p in predictions]), scene.classes)
    wanted = torch.full(logits.shape[1:3], 5)
    for row, count in enumerate(work.targets.counts):
        present = work.targets.labels[row, :count]
        wanted[row, present] = present
    weight = torch.tensor([1, 1, 1, 1, 1, 0.1])
    expected = sum(F.cross_entropy(layer.flatten(0, 1), wanted.flatten(), weight) for layer in logits)
    torch.testing.assert_close(terms_of(of, batch, matching="fixed")["class_ce"], expected)


def test_points_are_drawn_where_the_mask_is_unsure() -> None:
    logits = 3 * noise(2, 1, 8, 8)
    torch.manual_seed(5)
    places = losses.uncertain_points(logits, POINTS)
    torch.manual_seed(5)
    drawn, fresh = torch.rand(2, 120, 2), torch.rand(2, 10, 2)
    for i in range(2):
        doubt = sample_points(logits[i : i + 1], drawn[i : i + 1])[0, 0].abs()
        surest = {tuple(point) for point in drawn[i][doubt.argsort()[:30]].tolist()}
        assert {tuple(point) for point in places[i, :30].tolist()} == surest
        assert torch.equal(places[i, 30:], fresh[i])


def test_a_perfect_mask_costs_next_to_nothing_and_its_negative_much() -> None:
    truth = torch.zeros(1, 1, 16, 16)
    truth[..., :8, :] = 1
    logits = (40 * truth - 20)[None]
    config = LossConfig(points=2000, importance=0)
    right = losses.mask_losses(logits, truth, [pair([0], [0])], config)
    wrong = losses.mask_losses(-logits, truth, [pair([0], [0])], config)
    assert all(r < 0.1 * w for r, w in zip(right, wrong, strict=True))
    assert wrong[0] > 10 and wrong[1] > 0.9


def test_unmatched_masks_learn_nothing() -> None:
    logits, truth = noise(1, 1, 3, 8, 8).requires_grad_(), torch.ones(1, 1, 16, 16)
    sum(losses.mask_losses(logits, truth, [pair([1], [0])], POINTS)).backward()  # type: ignore[union-attr]
    assert logits.grad is not None
    assert (logits.grad[0, 0].abs().sum((1, 2)) > 0).tolist() == [False, True, False]


def test_no_masks_are_finite_and_connected() -> None:
    logits = noise(2, 1, 3, 8, 8).requires_grad_()
    for term in losses.mask_losses(logits, torch.zeros(1, 0, 16, 16), [pair([], [])] * 2, POINTS):
        assert term.item() == 0
        (gradient,) = torch.autograd.grad(term, logits, retain_graph=True)
        assert not gradient.any()


# ---------------------------------------------------------------------------------- queries and texts


def test_query_text_equals_its_formula() -> None:
    queries, texts, log_scale = noise(3, 5, 4), noise(3, 5, 4, seed=1), torch.tensor(1.5)
    q, t = (x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True) for x in (queries, texts))
    logits = log_scale.exp() * q @ t.T
    expected = -logits.log_softmax(1).diag().mean() - logits.log_softmax(0).diag().mean()
    torch.testing.assert_close(losses.query_text_loss(queries, texts, log_scale), expected)


def test_query_text_of_one_image_is_zero() -> None:
    queries = noise(1, 5, 4).requires_grad_()
    loss = losses.query_text_loss(queries, noise(1, 5, 4, seed=1), torch.tensor(2.0))
    loss.backward()
    assert loss.item() == 0 and queries.grad is not None and not queries.grad.any()


def test_query_text_depends_on_the_pairs_of_query_and_text_alone() -> None:
    queries, texts, scale = noise(3, 5, 4), noise(3, 5, 4, seed=1), torch.tensor(2.0)
    order = [3, 0, 4, 1, 2]
    loss = losses.query_text_loss(queries, texts, scale)
    torch.testing.assert_close(losses.query_text_loss(queries[:, order], texts[:, order], scale), loss)
    assert not torch.allclose(losses.query_text_loss(queries[:, order], texts, scale), loss)


def test_query_text_scale_is_bounded() -> None:
    queries, texts = noise(3, 5, 4), noise(3, 5, 4, seed=1)
    one, other = (losses.query_text_loss(queries, texts, torch.tensor(x)) for x in (4.7, 9.0))
    torch.testing.assert_close(one, other)


# -------------------------------------------------------------------------------- every pixel


def test_the_label_map_is_void_where_no_mask_lies() -> None:
    masks = torch.zeros(2, 2, 2, 3)
    masks[0, 0, 0], masks[0, 1, 1, :2] = 1, 1
    targets = MaskTargets(masks=masks, labels=torch.tensor([[4, 0], [-1, -1]]), counts=(2, 0), texts=masks)
    assert losses.label_map(targets).tolist() == [[[4, 4, 4], [0, 0, -1]], [[-1] * 3] * 2]
    nothing = MaskTargets(masks=masks[:, :0], labels=masks[:, :0, 0, 0].long(), counts=(0, 0), texts=masks)
    assert losses.label_map(nothing).tolist() == [[[-1] * 3] * 2] * 2


def test_pixel_loss_equals_its_formula() -> None:
    logits = noise(2, 3, 2, 2).requires_grad_()
    truth = torch.randint(-1, 3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    large = F.interpolate(logits, size=(4, 4), mode="bilinear").double()
    places = (truth >= 0).nonzero().tolist()
    expected = [-float(large[r, :, y, x].log_softmax(0)[truth[r, y, x]].detach()) for r, y, x in places]
    assert losses.pixel_loss(logits, truth).item() == pytest.approx(np.mean(expected), abs=1e-6)
    void = losses.pixel_loss(logits, torch.full_like(truth, -1))
    void.backward()
    assert void.item() == 0 and logits.grad is not None and not logits.grad.any()


# -------------------------------------------------------------------------------- phrases and captions


def test_grounding_equals_its_formula() -> None:
    logits = noise(2, 2, 4, 3)
    pairs = [pair([0, 2], [1, 0]), pair([3], [0]), pair([1, 3], [0, 1]), pair([0], [0])]
    expected = 0.0
    for layer in range(2):
        rows = [(r, q, t) for r in range(2) for q, t in zip(*pairs[2 * layer + r], strict=True)]
        expected -= np.mean([float(logits[layer, r, :, t].log_softmax(0)[q]) for r, q, t in rows])
    assert losses.grounding_loss(logits, pairs).item() == pytest.approx(expected, rel=1e-5)


def test_phrases_are_packed_without_gaps() -> None:
    ids = tokenize(["a dog", "cat", "the big red square"], 20)
    phrases = features(ids)
    packed, sentences = losses.pack(phrases, [2, 1])
    assert (~packed.padding).sum(1).tolist() == [4 + 3, 6]
    expected = torch.cat((phrases.tokens[0, :4], phrases.tokens[1, :3]))
    torch.testing.assert_close(packed.tokens[0, :7], expected)
    assert packed.ids[1, :6].tolist() == ids[2].tolist()
    torch.testing.assert_close(sentences[0], phrases.sentence[:2])
    torch.testing.assert_close(sentences[1, 0], phrases.sentence[2])


def test_retrieval_contrast_equals_its_formula() -> None:
    a, b = (F.normalize(noise(4, 8, seed=seed), dim=-1) for seed in (0, 1))
    logits = 5 * a @ b.T
    expected = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    torch.testing.assert_close(losses._contrast(a, b, torch.tensor(5.0)), expected)


def test_fine_contrast_equals_its_formula() -> None:
    """X-Decoder, 3.7 B, with the target matrix written out."""
    captions, latents, scale = features(tokenize(["a dog", "the cat sat"], 20)), noise(2, 3, MODEL.width), 4.0
    lengths = [4, 5]
    tokens = torch.cat([captions.tokens[i, :n] for i, n in enumerate(lengths)])
    target = torch.zeros(2, 9)
    target[0, :4] = torch.tensor([1.0, 2, 3, 4]) / 10
    target[1, 4:] = torch.tensor([1.0, 2, 3, 4, 5]) / 15
    similarity = torch.zeros(2, 9)
    for i in range(2):
        for j in range(9):
            cosines = [F.cosine_similarity(latents[i, o], tokens[j], dim=0) for o in range(3)]
            similarity[i, j] = scale * torch.stack(cosines).mean()
    to_tokens = -(target * similarity.log_softmax(1)).sum(1).mean()
    to_images = -(target * similarity.log_softmax(0)).sum(0).mean()
    torch.testing.assert_close(
        losses.fine_contrast(latents, captions, torch.tensor(scale)), 0.7 * to_tokens + 0.3 * to_images
    )


def spoken(of: XDecoder, *captions: list[str]) -> tuple[TextFeatures, list[int]]:
    """The phrases of captions, encoded, and how many each has."""
    return of.text(tokenize([p for c in captions for p in c], 20)), [len(c) for c in captions]


def test_the_noun_loss_equals_its_formula() -> None:
    """X-Decoder, 3.5, with every assignment tried and every pair written out; one phrase is said twice."""
    of, latents = model(), noise(3, 4, MODEL.width)
    scene = scene_of(of, batch_of("retrieval"))
    captions = [["dog", "red square"], ["red square", "sky", "cat"], []]
    texts, counts = spoken(of, *captions)
    meanings = dict(zip([p for c in captions for p in c], texts.sentence, strict=True))
    pairs = []
    for i, caption in enumerate(captions):
        something = 1 - of.class_logits(latents[i], scene.classes).softmax(-1)[:, -1:]
        own = torch.stack([meanings[p] for p in caption]) if caption else torch.zeros(0, MODEL.width)
        similar = of.similarity(latents[i], own)
        likely = (something * similar.softmax(0) * similar.softmax(1)).tolist()
        ways = itertools.permutations(range(4), len(caption))
        best = max(ways, key=lambda way: sum(likely[q][n] for n, q in enumerate(way)))  # noqa: B023
        pairs += [(latents[i, q], p) for q, p in zip(best, caption, strict=True)]
    names = sorted({p for _, p in pairs})
    cosines = torch.stack(
        [torch.stack([F.cosine_similarity(x, meanings[name], dim=0) for name in names]) for x, _ in pairs]
    )
    logits = of.scale() * cosines
    rows = [-logits.log_softmax(1)[i, names.index(p)] for i, (_, p) in enumerate(pairs)]
    columns = []
    for j, name in enumerate(names):
        said = [i for i, (_, p) in enumerate(pairs) if p == name]
        columns.append(-sum(logits.log_softmax(0)[i, j] for i in said) / len(said))
    expected = 0.7 * sum(rows) / len(rows) + 0.3 * sum(columns) / len(columns)
    assert len(pairs) == 5 and len(names) == 4
    torch.testing.assert_close(losses.noun_loss(scene, latents[None], texts, counts), expected)


@pytest.mark.parametrize(
    ("noun", "other", "shares", "learns"),
    [
        # both mean it alike, the first is no object
        ("dog", "cat", [(1, 2), (1, 0)], 1),
        # the second is rather an object, and means the contrary
        ("red square", "sky", [(1, 0.05), (0, -1)], 0),
    ],
)
def test_a_lone_noun_goes_to_the_latent_that_means_it_and_is_something(
    noun: str, other: str, shares: list[tuple[float, float]], learns: int
) -> None:
    """Two latents, each made of the noun's meaning and of nothing's; another picture speaks of another."""
    of = model()
    scene, (texts, _) = scene_of(of, batch_of("retrieval")), spoken(of, [noun])
    named, nothing = (F.normalize(x, dim=0) for x in (texts.sentence[0], scene.classes[-1]))
    latents = torch.stack([a * named + b * nothing for a, b in shares])[None].detach().requires_grad_()
    both = torch.cat((latents, latents.detach()))[None]
    losses.noun_loss(scene, both, *spoken(of, [noun], [other])).backward()
    assert latents.grad is not None
    assert latents.grad[0, learns].any() and not latents.grad[0, 1 - learns].any()


def test_captions_that_speak_of_nothing_teach_no_noun() -> None:
    of = model()
    latents = noise(2, 4, MODEL.width).requires_grad_()
    loss = losses.noun_loss(scene_of(of, batch_of("retrieval")), latents[None], *spoken(of, [], []))
    loss.backward()
    assert loss.item() == 0 and latents.grad is not None and not latents.grad.any()


def test_more_phrases_than_latents_leave_some_out() -> None:
    of = model()
    scene, latents = scene_of(of, batch_of("retrieval")), noise(1, 2, MODEL.width)
    found = losses.noun_loss(scene, latents[None], *spoken(of, ["dog", "cat", "sky", "grass"]))
    assert torch.isfinite(found)


# ------------------------------------------------------------------------------------- whole requests


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_half_precision_does_not_round_what_is_scaled(scale: float) -> None:
    """Of similar names, as trained encoders give: bfloat16 knows no more than 0.4 of a logit near 100."""
    of = model(no_object=None).requires_grad_(False)
    of.log_scale.fill_(math.log(scale))
    meaning, names = (noise(n, 32, seed=n) * 0.6 + noise(32, seed=1) for n in (20, 30))
    captions = features(tokenize(["a red square", "on grass", "a dog in the park"], 20))
    pairs = noise(2, 3, 32, seed=3).mul(0.3).add(noise(32)).requires_grad_()

    def found(half: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = of.similarity(meaning, names), of.class_logits(meaning, names)
            infonce = losses._contrast(*F.normalize(pairs, dim=-1), torch.tensor(scale))
            fine = losses.fine_contrast(pairs.transpose(0, 1), captions, torch.tensor(scale))
        gradients = [torch.autograd.grad(loss, pairs)[0] for loss in (infonce, fine)]
        return [*logits, infonce, fine, *gradients]

    for half, whole in zip(found(True), found(False), strict=True):
        assert half.equal(whole)
    known = [x.bfloat16() for x in (meaning, names)]  # as the layers before hand them on
    assert of.similarity(*known).equal(of.similarity(*(x.float() for x in known)))


def scene_of(of: XDecoder, batch: Batch, **loss: float) -> Scene:
    classes = ClassTexts.of(VOCABULARY.taxonomy.names, MODEL.text.context)
    return Scene(
        model=of,
        pixels=of.encode(batch.images, batch.padding),
        classes=classes.embed(of.text(classes.ids).sentence),
        answers=of.encode_texts(VOCABULARY.answers).sentence,
        tasks=of.text(of.task_ids).sentence,
        config=LOSS.model_copy(update=loss),  # type: ignore[arg-type]
    )


def batch_of(task: str, count: int = 2) -> Batch:
    train = train_config(tasks=(task,))
    stream = "segmentation" if task in TASKS[:4] else "image_text"
    make = BatchMaker(stream=stream, setting=Setting(model=MODEL, train=train, vocabulary=VOCABULARY))  # type: ignore[arg-type]
    return make(samples(count), list(range(count)))


def test_matched_masks_are_those_of_all_masks_with_the_same_gradient() -> None:
    """Pictures asked twice, in another order; a request without a match among them."""
    of, batch = model(), batch_of("panoptic")
    scene, images = scene_of(of, batch), torch.tensor([1, 0, 1])
    asked = of.ask(scene.pixels, "segmentation", images, scene.tasks[[TASKS.index("panoptic")] * 3])
    predictions = asked.predictions[-2:]
    pairs = [pair([5, 2], [0, 1]), pair([], []), pair([7], [0]), pair([0, 1], [1, 0]), pair([3], [0])]
    pairs.append(pair([2], [0]))
    layer, row, query, _ = losses.matched(pairs, len(images)).unbind(1)
    every = torch.stack([of.masks(p, scene.pixels, images) for p in predictions])[layer, row, query]
    alone = losses._matched_masks(scene, predictions, images, pairs)
    torch.testing.assert_close(alone, every)
    weight = of.decoder.mask_embed[0].weight
    gradients = [
        torch.autograd.grad((m * noise(*m.shape)).sum(), weight, retain_graph=True) for m in (alone, every)
    ]
    torch.testing.assert_close(*gradients)


def test_captioning_equals_its_formula() -> None:
    of, batch = model(), batch_of("captioning")
    (work,) = batch.works
    texts = of.text(work.targets.texts)
    scene = scene_of(of, batch, top_layers=2)
    loss = losses.captioning(scene, work, texts)["captioning"]
    outputs = of.ask(
        scene.pixels, "captioning", work.images, scene.tasks[[TASKS.index("captioning")] * 2], texts
    )
    expected, lengths = torch.tensor(0.0), (~texts.padding).sum(1).tolist()
    for prediction in outputs.predictions[-2:]:
        assert prediction.text is not None
        words = torch.tensor(0.0)
        for row, length in enumerate(lengths):
            logits = of.caption_logits(prediction.text[row]).log_softmax(-1)
            words = words - sum(logits[i, texts.ids[row, i + 1]] for i in range(length - 1))
        expected = expected + words / (sum(lengths) - len(lengths) + 1)
    torch.testing.assert_close(loss, expected)


def test_the_rivals_of_a_caption_stand_for_the_whole_vocabulary() -> None:
    """The softmax's denominator over drawn tokens is on average the one over all; the words are always in."""
    torch.manual_seed(0)
    wanted, logits = torch.tensor([7, 300, 7]), noise(VOCABULARY_SIZE)
    denominators = []
    for _ in range(50):
        tokens, places, counts = losses.candidates(wanted, 1000)
        assert tokens is not None and torch.equal(tokens[places], wanted)
        assert torch.equal(counts[places], torch.zeros(3))
        assert not torch.isin(tokens[2:], wanted).any() and len(tokens) <= 1002
        denominators.append((logits[tokens] + counts).exp().sum())
    torch.testing.assert_close(torch.stack(denominators).mean(), logits.exp().sum(), rtol=0.02, atol=0)


def test_without_rivals_drawn_a_caption_is_asked_of_the_whole_vocabulary() -> None:
    wanted = torch.tensor([7, 300, 7])
    tokens, places, counts = losses.candidates(wanted, 0)
    assert tokens is None and torch.equal(places, wanted) and not counts.any()


@pytest.mark.parametrize("negatives", [2000, 40_000])
def test_a_caption_among_rivals_costs_about_what_it_costs_among_all(negatives: int) -> None:
    torch.manual_seed(0)
    of, batch = model(), batch_of("captioning")
    (work,) = batch.works
    texts = of.text(work.targets.texts)
    full = losses.captioning(scene_of(of, batch), work, texts)["captioning"]
    drawn = losses.captioning(scene_of(of, batch, caption_negatives=negatives), work, texts)["captioning"]
    torch.testing.assert_close(drawn, full, rtol=0.01, atol=0)
    assert drawn != full
    drawn.backward()
    assert of.text.token_embedding.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_vqa_equals_its_formula() -> None:
    of, batch = model(), batch_of("vqa")
    (work,) = batch.works
    texts = of.text(work.targets.texts)
    scene = scene_of(of, batch, top_layers=1)
    loss = losses.vqa(scene, work, texts)["vqa"]
    final = of.ask(scene.pixels, "vqa", work.images, scene.tasks[[TASKS.index("vqa")] * 2], texts).final
    assert final.text is not None
    expected = torch.tensor(0.0)
    for row, length in enumerate((~texts.padding).sum(1).tolist()):
        meaning = F.normalize(of.decoder.class_embed(final.text[row, length - 1]), dim=0)
        logits = of.scale() * F.normalize(scene.answers, dim=-1) @ meaning
        expected = expected - (work.targets.answers[row] * logits.log_softmax(0)).sum() / 2  # type: ignore[union-attr]
    torch.testing.assert_close(loss, expected)


def test_segmentation_without_targets_is_finite_and_connected() -> None:
    of, batch = model(), batch_of("panoptic")
    empty = MaskTargets(
        masks=pad_masks([np.zeros((0, 32, 32), dtype=bool)] * 2),
        labels=torch.zeros(2, 0, dtype=torch.int64),
        counts=(0, 0),
        texts=tokenize(["a panoptic photo"] * 14, 20),
    )
    work = Work(kind="semantic", tasks=("panoptic", "panoptic"), images=torch.tensor([0, 1]), targets=empty)
    terms = losses.segmentation(scene_of(of, batch), work, of.text(empty.texts))
    loss = losses.total(terms, LOSS)
    loss.backward()
    assert torch.isfinite(loss) and terms["region_ce"].item() == 0
    assert terms["mask_bce"].item() == terms["mask_dice"].item() == 0
    assert terms["class_ce"].item() > 0  # every latent learns to be background
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in of.parameters())


def test_more_targets_than_latents_are_finite() -> None:
    of, batch = model(latents=2, text_contexts=1), batch_of("panoptic")
    (work,) = batch.works
    assert isinstance(work.targets, MaskTargets) and min(work.targets.counts) > 2
    texts = of.text(tokenize(["a panoptic photo"] * 4, 20))
    terms = losses.segmentation(scene_of(of, batch), work, texts)
    assert all(torch.isfinite(value) for value in terms.values())


def test_masks_are_divided_by_the_number_of_targets_also_where_latents_are_fewer() -> None:
    logits, truth = 3 * noise(1, 1, 3, 8, 8), (noise(1, 7, 8, 8, seed=1) > 0).float()
    whole, pairs = LossConfig(points=0), [pair([0, 1, 2], [5, 1, 3])]
    x, y = logits[0, 0].double().flatten(1), truth[0, [5, 1, 3]].double().flatten(1)
    p = x.sigmoid()
    bce = -(y * p.log() + (1 - y) * (1 - p).log()).mean(1).sum()
    dice = (1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)).sum()
    for count in (7, 3):  # of segmentation and grounding (X-Decoder, 3.3 and 3.9)
        found = torch.stack(losses.mask_losses(logits, truth, pairs, whole, count=count))
        torch.testing.assert_close(found.double(), torch.stack((bce, dice)) / count, atol=1e-6, rtol=1e-6)


def test_segmentation_counts_its_targets_and_grounding_its_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int | None] = []

    def counting(*given: Any) -> tuple[Tensor, Tensor]:
        counted.append(given[5] if len(given) > 5 else None)
        return given[0].sum(), given[0].sum()

    monkeypatch.setattr(losses, "matched_losses", counting)
    of = model(latents=1, text_contexts=0, task_tokens=False)
    for task, loss in (("panoptic", losses.segmentation), ("referring", losses.referring)):
        (work,) = (batch := batch_of(task)).works
        loss(scene_of(of, batch), work, of.text(work.targets.texts))
    targets = batch_of("panoptic").works[0].targets
    assert isinstance(targets, MaskTargets) and counted == [sum(targets.counts), None]


def test_without_targets_and_a_weight_for_no_object_nothing_is_learnt() -> None:
    logits, none = noise(2, 1, 4, 4).requires_grad_(), torch.zeros(1, 0, dtype=torch.int64)
    loss = losses.class_loss(logits, none, [pair([], [])] * 2, 0.0)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_pictures_that_tell_of_no_task_cost_nothing() -> None:
    setting = Setting(model=MODEL, train=train_config(), vocabulary=VOCABULARY)
    mute = [bare(sample) for sample in samples(2)]
    batches = tuple(BatchMaker(stream=s, setting=setting)(mute, [0, 1]) for s in STREAM_FIELDS)
    of = model()
    loss = losses.total(Objective(of, LOSS, VOCABULARY)(batches), LOSS)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in of.parameters())


def test_every_task_alone_gives_its_own_terms() -> None:
    masks = {"class_ce", "region_ce", "mask_bce", "mask_dice", "query_text"}
    expected = {
        "semantic": masks,
        "instance": masks,
        "panoptic": masks,
        "referring": {"grounding_ce", "grounding_bce", "grounding_dice"},
        "retrieval": {"retrieval", "retrieval_backbone", "nouns"},
        "captioning": {"captioning"},
        "vqa": {"vqa"},
    }
    objective = Objective(model(), LOSS, VOCABULARY)
    for task in TASKS:
        terms = objective((batch_of(task),))
        assert set(terms) == expected[task]
        assert all(torch.isfinite(value) and value.ndim == 0 for value in terms.values())


# ------------------------------------------------------------------------------------------- two ranks


def run_ranks(work: Callable[[int, Path], None], folder: Path) -> list[dict[str, Tensor]]:
    """`work(rank, folder)` in two processes that form a gloo group; what each saved as RANK.pt."""
    torch.multiprocessing.spawn(_in_group, args=(work, folder), nprocs=2)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def _in_group(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=patience
    )
    work(rank, folder)
    dist.destroy_process_group()


def contrasts(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Both contrastive losses of rows seen through a shared weight."""
    x, y = F.normalize(a @ weight, dim=-1), F.normalize(b @ weight, dim=-1)
    three = losses.query_text_loss((a @ weight)[:, None], (b @ weight)[:, None], torch.tensor(1.0))
    return losses._contrast(x, y, torch.tensor(3.0)) + three


CUTS = (3, 4, 5)  # rows of the first rank, of five


def contrast_rank(rank: int, folder: Path) -> None:
    found = {}
    for cut in CUTS:
        rows = slice(0, cut) if rank == 0 else slice(cut, None)
        weight = noise(6, 6, seed=9).requires_grad_()
        loss = contrasts(noise(5, 6)[rows], noise(5, 6, seed=1)[rows], weight)
        loss.backward()
        found |= {f"loss {cut}": loss.detach(), f"gradient {cut}": weight.grad}
    torch.save(found, folder / f"{rank}.pt")


def test_two_ranks_give_the_gradients_of_the_joined_batch(tmp_path: Path) -> None:
    """Also where they hold different numbers of rows, or one holds none."""
    ranks = run_ranks(contrast_rank, tmp_path)
    weight = noise(6, 6, seed=9).requires_grad_()
    loss = contrasts(noise(5, 6), noise(5, 6, seed=1), weight)
    loss.backward()
    for cut in CUTS:
        for name, expected in (("loss", loss.detach()), ("gradient", weight.grad)):
            mean = sum(rank[f"{name} {cut}"] for rank in ranks) / 2  # as DistributedDataParallel averages
            torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-6)


def uneven_rank(rank: int, folder: Path) -> None:
    """A step of all tasks; the second rank's pictures have captions and masks of segments alone."""
    chosen = samples(2) if rank == 0 else [bare(s, "segments") for s in samples(4)[2:]]
    told = samples(2) if rank == 0 else [bare(s, "questions") for s in samples(4)[2:]]
    setting = Setting(model=MODEL, train=train_config(), vocabulary=VOCABULARY)
    batches = (
        BatchMaker(stream="segmentation", setting=setting)(chosen, [0, 1]),
        BatchMaker(stream="image_text", setting=setting)(told, [0, 1]),
    )
    of = model().train()
    torch.manual_seed(rank)
    parallel = nn.parallel.DistributedDataParallel(
        Objective(of, LOSS, VOCABULARY), find_unused_parameters=True
    )
    losses.total(parallel(batches), LOSS).backward()
    total = torch.stack([p.grad.norm() for p in of.parameters() if p.grad is not None]).norm()
    torch.save({"norm": total}, folder / f"{rank}.pt")


def test_ranks_whose_pictures_can_tell_of_different_tasks_step_together(tmp_path: Path) -> None:
    one, two = run_ranks(uneven_rank, tmp_path)
    assert torch.isfinite(one["norm"]) and one["norm"] > 0
    assert torch.equal(one["norm"], two["norm"])
