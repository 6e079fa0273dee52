"""Laws of classes that never had a mask: the paper's formulas, what the image branch sees, CLIP's weights."""

import itertools

import open_clip
import pytest
import torch
from test_predictor import CARD
from tiny import MODEL, TAXONOMY, VOCABULARY, model, samples
from torch import Tensor
from torch.nn import functional as F

from schemas.jobs import ModelConfig, TextConfig, ZeroShotConfig
from schemas.taxonomy import Category, Taxonomy
from xdecoder.inference import postprocess
from xdecoder.inference.metrics import harmonic
from xdecoder.inference.postprocess import Frame
from xdecoder.inference.predictor import Predictor
from xdecoder.inference.zeroshot import (
    ImageBranch,
    ZeroShot,
    branch_of,
    cut,
    ensemble,
    own_branch,
    tight_boxes,
)
from xdecoder.model.clip import load_clip, text_weights
from xdecoder.model.text import TextEncoder
from xdecoder.model.xdecoder import ClassTexts
from xdecoder.prompts import tokenize

UNSEEN = Taxonomy(name="more", categories=(*TAXONOMY.categories, Category(name="lava", isthing=False)))
BLANK = (0.5, 0.4, 0.3)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_ensemble_equals_its_formula() -> None:
    """ZegFormer, 3.4, with weight 2/3."""
    p, q = (noise(4, 6, seed=s).double().softmax(-1) for s in (0, 1))
    seen = torch.tensor([True, False, True, True, False, False])
    found = ensemble(p, q, seen, 2 / 3)
    for query, c in itertools.product(range(4), range(6)):
        mean = (q[query, 0] + q[query, 2] + q[query, 3]) / 3
        expected = (
            p[query, c] ** (2 / 3) * mean ** (1 / 3)
            if seen[c]
            else p[query, c] ** (1 / 3) * q[query, c] ** (2 / 3)
        )
        torch.testing.assert_close(found[query, c], expected, atol=1e-9, rtol=0)
    alone = ensemble(p, q, torch.zeros(6, dtype=torch.bool), 2 / 3)
    torch.testing.assert_close(alone, p ** (1 / 3) * q ** (2 / 3))


def test_the_branch_cannot_rank_seen_classes() -> None:
    p, q = (noise(4, 6, seed=s).softmax(-1) for s in (0, 1))
    order = torch.tensor([2, 1, 0, 3, 4, 5])  # two seen classes change places in the branch alone
    seen = torch.tensor([True, True, True, False, False, False])
    torch.testing.assert_close(ensemble(p, q, seen, 0.7), ensemble(p, q[:, order], seen, 0.7))


def test_calibration_comes_after_the_sum_over_segments() -> None:
    frame = Frame(padded=(4, 4), valid=(4, 4), original=(4, 4))
    probs, masks = torch.tensor([[0.5, 0.45, 0.05], [0.3, 0.32, 0.38]]), torch.full((2, 4, 4), 20.0)
    assert (postprocess.semantic(probs, masks, frame) == 0).all()  # 0.8 and 0.77
    handicap = ZeroShot(ZeroShotConfig(gamma=0.1), None).handicap(torch.tensor([True, False]))
    assert (postprocess.semantic(probs, masks, frame, handicap) == 1).all()  # 0.7 and 0.77
    assert (postprocess.semantic(probs, masks, frame, 0.2 * handicap) == 0).all()  # 0.78 and 0.77


def test_the_harmonic_mean_of_nothing_is_nothing() -> None:
    assert harmonic(36.6, 33.2) == pytest.approx(34.8, abs=0.05)  # ZegFormer's own figures
    assert harmonic(0, 0) == harmonic(50, 0) == 0


# ------------------------------------------------------------------------------------------- regions


def test_boxes_are_tight_and_a_thin_mask_takes_the_whole_picture() -> None:
    masks = torch.zeros(4, 6, 8, dtype=torch.bool)
    masks[0, 1:4, 2:7] = True
    masks[1, 2, 1:5] = True  # one row
    masks[2, 0, 0] = masks[2, 5, 7] = True
    whole = [0, 0, 8, 6]
    assert tight_boxes(masks).tolist() == [[2, 1, 6, 3], whole, [0, 0, 7, 5], whole]


def test_what_the_encoder_sees_of_a_region() -> None:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    masks[0, 8:17, 4:21] = True
    masks[0, 10, 10] = False
    blank = torch.tensor(BLANK).view(3, 1, 1)
    masked = torch.where(masks, image, blank)
    seen = {how: cut(image, masks, how, 16, BLANK)[0] for how in ("mask", "crop", "cropmask")}
    torch.testing.assert_close(seen["mask"], F.interpolate(masked[None], (16, 16), mode="bilinear")[0])
    for how, picture in (("crop", image), ("cropmask", masked)):
        # 16 columns from 4 to 20, so a cell is one pixel; 8 rows from 8 to 16, so two cells are one
        column = picture[:, 8:16, 4:20]
        between = F.interpolate(column[None], (16, 16), mode="bilinear")[0]
        torch.testing.assert_close(seen[how][:, 2:-2], between[:, 2:-2], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(seen["crop"], seen["cropmask"], atol=1e-3)


# ------------------------------------------------------------------------------------------- the branch


def fixed_branch(looks: Tensor, texts: Tensor) -> ImageBranch:
    """Says what it is told to: the arithmetic around an encoder is on trial, not the encoder."""
    rows = iter(looks.split(1))
    return ImageBranch(
        encode_images=lambda regions: torch.cat([next(rows) for _ in regions]),
        encode_names=lambda names: texts[: len(names)],
        scale=10.0,
        side=8,
        blank=BLANK,
    )


def test_both_branches_share_the_no_object_logit() -> None:
    logits, looks = 3 * noise(20, 4), noise(20, 6, seed=1)
    texts = F.normalize(noise(3, 6, seed=2), dim=-1)
    seen = torch.tensor([True, True, False])
    of = ZeroShot(ZeroShotConfig(regions="crop"), fixed_branch(looks, texts))
    frame = Frame(padded=(16, 16), valid=(12, 16), original=(24, 32))
    found = of.probabilities(logits, torch.rand(3, 12, 16), noise(20, 4, 4), frame, ["a", "b", "c"], seen)
    similar = torch.cat((10 * F.normalize(looks, dim=-1) @ texts.T, logits[:, 3:]), 1)
    expected = ensemble(logits.softmax(-1)[:, :3], similar.softmax(-1)[:, :3], seen, 2 / 3)
    torch.testing.assert_close(found[:, :3], expected)
    torch.testing.assert_close(found[:, 3], logits.softmax(-1)[:, 3])


def test_half_precision_does_not_round_what_the_branch_scales() -> None:
    frame = Frame(padded=(16, 16), valid=(12, 16), original=(24, 32))
    names, seen = ["a", "b", "c"], torch.tensor([True, True, False])
    looks, texts = noise(20, 6, seed=1), F.normalize(noise(3, 6, seed=2), dim=-1)
    told = 3 * noise(20, 4), torch.rand(3, 12, 16), noise(20, 4, 4), frame, names, seen
    whole, half = (ZeroShot(ZeroShotConfig(regions="crop"), fixed_branch(looks, texts)) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = half.probabilities(*told)
    assert found.equal(whole.probabilities(*told))


def clip() -> open_clip.CLIP:
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
    text = {"context_length": 20, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=48, vision_cfg=vision, text_cfg=text, quick_gelu=True).eval()


def test_clip_reads_the_same_with_our_encoder() -> None:
    theirs, ours = clip(), TextEncoder(48, TextConfig(layers=2, heads=2, context=20))
    ours.load_state_dict(text_weights(theirs.state_dict()))
    ids = tokenize(["a dog", "a photo of the large red square.", "grass"], 20)
    with torch.no_grad():
        expected = theirs.encode_text(F.pad(ids, (0, 20 - ids.shape[1])))
        torch.testing.assert_close(ours(ids).sentence, expected, atol=1e-5, rtol=1e-4)


def test_an_unknown_clip_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(ValueError, match="open_clip has no 'ViT-B-16/nobody'; write MODEL/TAG, near"):
        load_clip("ViT-B-16/nobody")


@pytest.mark.parametrize("regions", ["crop", "mask", "cropmask"])
def test_a_clip_judges_regions(regions: str) -> None:
    branch = branch_of(clip().requires_grad_(False), ("a photo of a {}.", "the {}"))
    of = ZeroShot(ZeroShotConfig(regions=regions), branch)  # type: ignore[arg-type]
    predictor = Predictor(model(), CARD)
    images = [sample.image for sample in samples(2)]
    results = predictor.semantic(images, UNSEEN, zeroshot=of)
    assert [r.labels.shape for r in results] == [image.shape[:2] for image in images]
    assert branch.encode_names(("dog", "grass")).shape == (2, 48)


def test_the_models_own_image_embedding_is_that_of_retrieval() -> None:
    of = model().requires_grad_(False)
    branch = own_branch(of, ("{}",), 32)
    pictures = [sample.image for sample in samples(2)]
    regions = torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 255 for p in pictures])
    looks = F.normalize(branch.encode_images(regions), dim=-1)
    backbone = F.normalize(of.embed_pooled(of.encode(regions, regions[:, 0] < 0)), dim=-1)
    texts = F.normalize(of.encode_texts(["dog", "cat"]).sentence, dim=-1)
    torch.testing.assert_close(branch.encode_names(("dog", "cat")), texts)
    scores = Predictor(of, CARD).retrieve(pictures, ["dog", "cat"]).scores
    torch.testing.assert_close((looks + backbone) @ texts.T / 2, torch.from_numpy(scores))


def test_without_a_second_opinion_nothing_changes() -> None:
    predictor, images = Predictor(model(), CARD), [samples(1)[0].image]
    plain = predictor.semantic(images, UNSEEN)[0].labels
    off = ZeroShot.of(ZeroShotConfig(), predictor.model, 32)
    assert (predictor.semantic(images, UNSEEN, zeroshot=off)[0].labels == plain).all()
    unseen = ZeroShot.of(ZeroShotConfig(gamma=1), predictor.model, 32)
    assert (
        predictor.semantic(images, UNSEEN, zeroshot=unseen)[0].labels == len(VOCABULARY.taxonomy.names)
    ).all()


# ------------------------------------------------------------------------------------------- names


def test_a_class_is_the_mean_over_its_synonyms_in_every_prompt() -> None:
    of = model().requires_grad_(False)
    texts = ClassTexts.of(["dog, hound", "grass"], 20, ("a {}", "the {} here"), no_object=None)
    classes = texts.embed(of.text(texts.ids).sentence)
    each = of.encode_texts(
        ["a dog", "the dog here", "a hound", "the hound here", "a grass", "the grass here"]
    )
    unit = F.normalize(each.sentence, dim=-1)
    torch.testing.assert_close(
        classes, F.normalize(torch.stack((unit[:4].mean(0), unit[4:].mean(0))), dim=-1)
    )


def test_the_length_of_the_learned_no_object_counts() -> None:
    of = model(no_object=None).requires_grad_(False)
    assert of.no_object.norm() < 1
    queries, classes = noise(2, 3, MODEL.width), F.normalize(noise(4, MODEL.width, seed=1), dim=-1)
    logits = of.class_logits(queries, classes)
    torch.testing.assert_close(logits[..., :4], of.similarity(queries, classes))
    torch.testing.assert_close(logits[..., 4], of.scale() * F.normalize(queries, dim=-1) @ of.no_object)
    assert len(of.class_texts(["a", "b"]).rows) == 2 and len(model().class_texts(["a", "b"]).rows) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts": ("a photo",)}, "must hold {} once"),
        ({"prompts": ("{} and {}",)}, "must hold {} once"),
        ({"prompts": ("{name}",)}, "must hold {} once"),
        ({"no_object": None, "classes": 3}, "learned no_object goes with class names"),
    ],
)
def test_wrong_words_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModelConfig(**changes)  # type: ignore[arg-type]


def test_a_frozen_text_encoder_does_not_learn() -> None:
    text = MODEL.text
    assert text is not None
    of = model(text=text.model_copy(update={"frozen": True}))
    assert not any(p.requires_grad for p in of.text.parameters())
    assert all(p.requires_grad for n, p in of.named_parameters() if not n.startswith("text."))
