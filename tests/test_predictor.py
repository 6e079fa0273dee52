"""Laws of prediction: whatever form a picture has, answers of its own size, and one clear error otherwise."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import COLOURS, MODEL, VOCABULARY, model, samples

from jobs.serving import _image as served_image
from pipelines.stream import decode_image
from schemas.jobs import TextConfig
from schemas.masks import Array, decode_rle
from schemas.records import Rle
from schemas.taxonomy import Taxonomy
from xdecoder.inference.predictor import Predictor, TextCache, embed_classes, read_picture
from xdecoder.model.files import ModelCard, save_model

COMMON = [
    f"{a}{b}" for a in ("b", "c", "d", "f", "g", "h", "l", "m", "n", "p") for b in range(20)
]  # 200 words
PHRASES = ("the red square", "blue square", "grass")
CARD = ModelCard(
    model=MODEL, taxonomy=VOCABULARY.taxonomy, answers=VOCABULARY.answers, image_size=48, image_text_size=32
)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(model(), CARD, batch=2)


@pytest.fixture(scope="module")
def pictures() -> list[Array]:
    """Two of different sizes, neither square nor of the training's size."""
    return [samples(1, height=40, width=70)[0].image, samples(2, height=90, width=50)[1].image]


# a name, how to ask it, and what of an answer to compare
ASK: dict[str, Callable[[Predictor, Any], Any]] = {
    "panoptic": lambda p, x: p.panoptic([x], object_threshold=0)[0],
    "semantic": lambda p, x: p.semantic([x])[0],
    "instance": lambda p, x: p.instance([x], top_k=5)[0],
    "refer": lambda p, x: p.refer(x, PHRASES),
    "caption": lambda p, x: p.caption([x], max_tokens=4)[0],
    "answer": lambda p, x: p.answer(x, ["is it red?", "what is it?"])[1],
}


@pytest.mark.parametrize("task", ASK)
def test_arrays_pil_images_and_files_give_one_answer(
    predictor: Predictor, pictures: list[Array], tmp_path: Path, task: str
) -> None:
    path = tmp_path / "picture.png"
    Image.fromarray(pictures[0]).save(path)
    forms = [pictures[0], Image.fromarray(pictures[0]), path, str(path), Image.open(path).convert("RGBA")]
    first, *others = [ASK[task](predictor, form).to_json() for form in forms]
    assert all(other == first for other in others)


@pytest.mark.parametrize("task", ASK)
def test_answers_draw_themselves_and_are_json(predictor: Predictor, pictures: list[Array], task: str) -> None:
    result = ASK[task](predictor, pictures[0])
    assert json.loads(json.dumps(result.to_json())) == result.to_json()
    drawn = result.draw()
    assert isinstance(drawn, Image.Image) and drawn.width >= 70
    np.testing.assert_array_equal(result.image, pictures[0])


def test_answers_have_the_size_of_their_picture(predictor: Predictor, pictures: list[Array]) -> None:
    both = zip(
        predictor.panoptic(pictures, object_threshold=0),
        predictor.semantic(pictures),
        predictor.instance(pictures),
        pictures,
        strict=True,
    )
    for panoptic, semantic, instance, picture in both:
        size = picture.shape[:2]
        assert panoptic.map.labels.shape == semantic.labels.shape == size
        assert instance.instances.masks.shape[1:] == size
        assert predictor.refer(picture, PHRASES).masks.shape == (3, *size)


def test_masks_in_json_are_those_of_the_answer(predictor: Predictor, pictures: list[Array]) -> None:
    result = predictor.semantic(pictures[:1])[0]
    for row in result.to_json()["classes"]:
        mask = decode_rle(Rle(size=tuple(row["mask"]["size"]), counts=row["mask"]["counts"]))
        np.testing.assert_array_equal(mask, result.labels == result.names.index(row["category"]))
        assert row["area"] == mask.sum()


def test_pictures_of_one_size_do_not_disturb_one_another(predictor: Predictor) -> None:
    images = [sample.image for sample in samples(3)]  # more than a batch holds
    together = predictor.semantic(images)
    assert len(together) == 3
    for image, result in zip(images, together, strict=True):
        np.testing.assert_array_equal(result.labels, predictor.semantic([image])[0].labels)
    captions = [result.text for result in predictor.caption(images, max_tokens=4)]
    assert captions == [predictor.caption([image], max_tokens=4)[0].text for image in images]


def test_no_phrase_and_no_question_disturbs_another(predictor: Predictor, pictures: list[Array]) -> None:
    together = predictor.refer(pictures[0], PHRASES).masks
    for i, phrase in enumerate(PHRASES):
        np.testing.assert_array_equal(together[i], predictor.refer(pictures[0], [phrase]).masks[0])
    questions = ["is it red?", "what is left of the big blue square?"]
    answers = predictor.answer(pictures[0], questions)
    for question, result in zip(questions, answers, strict=True):
        (alone,) = predictor.answer(pictures[0], [question])
        assert alone.text == result.text and result.question == question
        assert alone.score == pytest.approx(result.score, rel=1e-4)


def test_the_class_list_is_an_argument(predictor: Predictor, pictures: list[Array]) -> None:
    result = predictor.semantic(pictures[:1], ["zebra", "grass"])[0]
    assert result.names == ("zebra", "grass") and set(np.unique(result.labels)) <= {0, 1}
    assert predictor.semantic(pictures[:1])[0].names == tuple(COLOURS)
    # grass keeps its kind, an unknown name is a thing
    instances = predictor.instance(pictures[:1], ["zebra", "grass"])[0].instances
    assert set(instances.labels.tolist()) <= {0}


def test_the_answer_comes_from_the_list_that_is_given(predictor: Predictor, pictures: list[Array]) -> None:
    (own,) = predictor.answer(pictures[0], ["what?"])
    (given,) = predictor.answer(pictures[0], ["what?"], ["purple"])
    assert own.text in VOCABULARY.answers and 0 < (own.score or 0) <= 1
    assert given.text == "purple" and given.score == pytest.approx(1)


def test_retrieval_scores_are_cosines_of_every_pair(predictor: Predictor, pictures: list[Array]) -> None:
    texts = ["a red square", "grass", "a red square"]
    result = predictor.retrieve([*pictures, pictures[0]], texts)
    assert result.scores.shape == (3, 3) and (np.abs(result.scores) <= 1.0001).all()
    np.testing.assert_allclose(result.scores[:, 0], result.scores[:, 2], atol=1e-6)
    np.testing.assert_allclose(result.scores[0], result.scores[2], atol=1e-5)
    rows = result.to_json()["texts"]
    assert json.loads(json.dumps(rows)) == rows
    for row, column in zip(rows, result.scores.T, strict=True):
        assert column[row["ranking"][0]] == column.max()


def test_a_saved_model_answers_the_same(predictor: Predictor, pictures: list[Array], tmp_path: Path) -> None:
    save_model(predictor.model, CARD, tmp_path)
    again = Predictor.load(tmp_path)
    for ask in ASK.values():
        assert ask(again, pictures[0]).to_json() == ask(predictor, pictures[0]).to_json()
    texts = ["a red square", "grass"]
    np.testing.assert_array_equal(
        again.retrieve(pictures[:1], texts).scores, predictor.retrieve(pictures[:1], texts).scores
    )


def test_a_model_is_found_by_its_address(
    predictor: Predictor, pictures: list[Array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "a model"
    save_model(predictor.model, CARD, folder)
    caption = predictor.caption(pictures)[0].text
    for place in (folder, str(folder), "~/a model", folder.as_uri(), Path("~/a model")):
        assert Predictor.load(place).caption(pictures)[0].text == caption
    (folder / "model.json").unlink()
    for place, said in (
        ("~/a model", "holds no model: model.json is missing"),
        (folder.as_uri(), r"^file://.*/a%20model holds no model: model.json is missing"),
        ("nowhere://bucket/model", "^nowhere://bucket/model: model.json cannot be fetched"),
        ("models:/street@champion", r"^models:/street@champion is known to MLflow.*jobs.tracking.connect"),
    ):
        with pytest.raises(ValueError, match=said):
            Predictor.load(place)


def test_predicting_leaves_no_gradients(predictor: Predictor, pictures: list[Array]) -> None:
    for ask in ASK.values():
        ask(predictor, pictures[0])
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in predictor.model.parameters())


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((4, 4, 3)), r"uint8\[H, W, 3\], this is float64\[4, 4, 3\]"),
        (np.zeros((4, 4), dtype=np.uint8), r"this is uint8\[4, 4\]"),
        (np.zeros((3, 4, 4), dtype=np.uint8), r"this is uint8\[3, 4, 4\]"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"this is uint8\[0, 4, 3\]"),
    ],
)
def test_an_array_that_is_no_picture_is_refused(array: Array, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_picture(array)


def test_files_that_are_no_pictures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"gone\.png: no such picture"):
        read_picture(tmp_path / "gone.png")
    words = tmp_path / "words.png"
    words.write_text("no picture")
    with pytest.raises(ValueError, match=r"words\.png: cannot be read as a picture"):
        read_picture(words)
    Image.fromarray(samples(1)[0].image).resize((300, 300)).save(tmp_path / "half.png")
    whole = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.png: cannot be read as a picture"):
        read_picture(tmp_path / "half.png")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read_picture(tmp_path)
    (tmp_path / "bomb.png").write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"bomb\.png: cannot be read as a picture"):
        read_picture(tmp_path / "bomb.png")


def test_a_turned_photograph_is_read_as_a_viewer_shows_it(tmp_path: Path) -> None:
    """Orientation 6 of EXIF: the file holds the picture turned left."""
    shown = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(shown))).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "turned.png"), shown)
    with Image.open(tmp_path / "turned.png") as image:
        assert np.array_equal(read_picture(image.convert("RGB")), shown)


def test_a_picture_is_read_as_training_reads_it(tmp_path: Path) -> None:
    """16-bit grey keeps its high byte, from a file, from memory and through the served model."""
    path = tmp_path / "grey.png"
    Image.fromarray(np.arange(0, 65536, 97, dtype=np.uint16)[:600].reshape(20, 30)).save(path)
    trained = decode_image(path.read_bytes())
    assert len(np.unique(trained)) > 200
    sent = base64.b64encode(path.read_bytes()).decode()
    for picture in (path, Image.open(path), served_image(sent)):
        np.testing.assert_array_equal(read_picture(picture), trained)
    wide = Image.fromarray(trained[..., 0].astype(np.int32) * 256)
    np.testing.assert_array_equal(read_picture(wide), trained)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "floats.tiff")
    for picture in (tmp_path / "floats.tiff", Image.open(tmp_path / "floats.tiff")):
        with pytest.raises(ValueError, match="its pixels are floats.*make them uint8"):
            read_picture(picture)
    with pytest.raises(ValueError, match="this is a Tensor"):
        read_picture(torch.zeros(3, 4, 4))  # type: ignore[arg-type]
    Image.fromarray(samples(1, height=300, width=300)[0].image).save(tmp_path / "half.png")
    whole = (tmp_path / "half.png").read_bytes()
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read_picture(Image.open(io.BytesIO(whole[: len(whole) // 2])))
    with pytest.raises(ValueError, match=r"neither a file here nor a JPEG or PNG in base64: 'grey\.png'"):
        served_image("grey.png")


def test_nothing_to_answer_is_an_error(predictor: Predictor, pictures: list[Array]) -> None:
    with pytest.raises(ValueError, match="at least one phrase"):
        predictor.refer(pictures[0], [])
    with pytest.raises(ValueError, match="at least one question"):
        predictor.answer(pictures[0], [])
    with pytest.raises(ValueError, match="at least one text"):
        predictor.retrieve(pictures, [])
    with pytest.raises(ValueError, match="no pictures"):
        predictor.caption([])
    with pytest.raises(ValueError, match="no pictures"):
        predictor.panoptic([])
    with pytest.raises(ValueError, match="no classes"):
        predictor.semantic(pictures, [])
    with pytest.raises(ValueError, match=r"stand twice: \['grass'\]"):
        predictor.semantic(pictures, ["grass", "grass"])


def test_one_where_a_list_is_meant_is_an_error(
    predictor: Predictor, pictures: list[Array], tmp_path: Path
) -> None:
    (tmp_path / "one.png").touch()
    ones: list[Any] = [pictures[0], Image.fromarray(pictures[0]), tmp_path / "one.png", "one.png"]
    for one in ones:
        for ask in (predictor.panoptic, predictor.caption, predictor.see):
            with pytest.raises(ValueError, match=r"pictures are a list, this is one: write \[picture\]"):
                ask(one)
    seen = predictor.see(pictures[:1])
    asked: dict[str, Callable[[Any], Any]] = {
        "phrases": lambda text: predictor.refer(seen, text),
        "texts": lambda text: predictor.retrieve(seen, text),
        "regions": lambda text: predictor.describe(seen, text),
        "questions": lambda text: predictor.answer(seen, text),
        "answers": lambda text: predictor.answer(seen, ["what?"], text),
        "classes": lambda text: predictor.semantic(seen, text),
    }
    for what, ask_with in asked.items():
        with pytest.raises(ValueError, match=rf"{what} are a list, this is one text: write \['red'\]"):
            ask_with("red")
    with pytest.raises(ValueError, match="a picture is .*, this is a list"):
        predictor.refer(pictures, ["red"])  # type: ignore[arg-type]
    assert len(predictor.semantic(picture for picture in pictures)) == 2  # type: ignore[arg-type]


CLOSED: dict[str, Any] = {"classes": 5}
WORDLESS: dict[str, Any] = {**CLOSED, "task_tokens": False, "text": None}
Asked = list[tuple[str, Callable[[Predictor, Array], Any]]]
PHRASES_ASKED: Asked = [
    ("referring", lambda p, x: p.refer(x, ["red"])),
    ("referring", lambda p, x: p.find([x], "red")),
    ("retrieval", lambda p, x: p.retrieve([x], ["red"])),
    ("vqa", lambda p, x: p.answer(x, ["what?"], ["red"])),
]
WORDS_ASKED: Asked = [
    *PHRASES_ASKED,
    ("captioning", lambda p, x: p.caption([x])),
    ("captioning", lambda p, x: p.describe(x, [np.ones(x.shape[:2], dtype=bool)])),
]
MASKS_ASKED: Asked = [("panoptic", lambda p, x: p.panoptic([x])), ("instance", lambda p, x: p.instance([x]))]


@pytest.mark.parametrize(
    ("changes", "beyond"),
    [
        (CLOSED, PHRASES_ASKED),
        (WORDLESS, WORDS_ASKED),
        ({"text": TextConfig(layers=1, heads=2, context=20, width=48), "task_tokens": False}, WORDS_ASKED),
        ({**WORDLESS, "output": "pixels", "decoder_layers": 0}, [*WORDS_ASKED, *MASKS_ASKED]),
    ],
    ids=["closed", "wordless", "other width", "per pixel"],
)
def test_what_an_architecture_cannot_do_is_one_error(
    changes: dict[str, Any], beyond: Asked, pictures: list[Array]
) -> None:
    of = model(**changes)
    predictor = Predictor(of, CARD.model_copy(update={"model": of.config}))
    for task, ask in beyond:
        with pytest.raises(ValueError, match=rf"cannot do '{task}': .* for \['semantic'"):
            ask(predictor, pictures[0])
    for _, ask in (asked for asked in MASKS_ASKED if asked not in beyond):
        ask(predictor, pictures[0])
    assert predictor.semantic(pictures[:1])


def test_a_model_without_answers_asks_for_a_list(pictures: list[Array]) -> None:
    silent = Predictor(model(), CARD.model_copy(update={"answers": ()}))
    with pytest.raises(ValueError, match="no answers to choose from.*give a list"):
        silent.answer(pictures[0], ["what?"])
    assert silent.answer(pictures[0], ["what?"], ["a", "b"])[0].text in ("a", "b")


def test_a_taxonomy_decides_what_is_a_thing(predictor: Predictor, pictures: list[Array]) -> None:
    stuff = Taxonomy.model_validate({"name": "s", "categories": [{"name": "zebra", "isthing": False}]})
    assert len(predictor.instance(pictures[:1], stuff)[0].instances.masks) == 0


def test_pictures_that_were_seen_pass_the_backbone_once(
    predictor: Predictor, pictures: list[Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    for part in (predictor.model.backbone, predictor.model.pixel_decoder):
        forward = part.forward
        monkeypatch.setattr(part, "forward", lambda *x, forward=forward: (encoded.append(1), forward(*x))[1])
    seen = predictor.see(pictures[:1])
    assert not encoded
    for task in ("panoptic", "semantic", "instance", "refer"):
        assert ASK[task](predictor, pictures[0]).to_json()
    alone, _ = len(encoded), encoded.clear()
    masked = [
        predictor.panoptic(seen, object_threshold=0)[0],
        predictor.semantic(seen)[0],
        predictor.instance(seen, top_k=5)[0],
        predictor.refer(seen, PHRASES),
    ]
    assert (alone, len(encoded)) == (8, 2)
    spoken = [
        predictor.caption(seen, max_tokens=4)[0],
        predictor.answer(seen, ["is it red?", "what is it?"])[1],
    ]
    predictor.retrieve(seen, ["grass"])
    assert len(encoded) == 4  # squeezed to the square of image and text, it is another picture
    for result, ask in zip((*masked, *spoken), ASK.values(), strict=True):
        assert result.to_json() == ask(predictor, pictures[0]).to_json()


def test_tasks_that_are_named_beforehand_share_one_decoder_pass(
    predictor: Predictor, pictures: list[Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    ask = predictor.model.ask
    monkeypatch.setattr(predictor.model, "ask", lambda *x: (rows.append(len(x[2])), ask(*x))[1])
    several, of_each = predictor.see([*pictures, pictures[0]], ["panoptic", "semantic", "instance"]), {}
    for name, method in (
        ("panoptic", lambda images: predictor.panoptic(images, object_threshold=0)),
        ("semantic", predictor.semantic),
        ("instance", lambda images: predictor.instance(images, top_k=5)),
    ):
        of_each[name] = [result.to_json() for result in method(several)]
    assert rows == [6, 3], "two pictures a batch, three tasks each, in one pass"
    for name, results in of_each.items():
        for result, picture in zip(results, [*pictures, pictures[0]], strict=True):
            assert result == ASK[name](predictor, picture).to_json()


def test_a_question_about_one_picture_refuses_several(predictor: Predictor, pictures: list[Array]) -> None:
    seen = predictor.see(pictures)
    for ask in (predictor.refer, predictor.answer, predictor.describe):
        with pytest.raises(ValueError, match="about one picture, 2 were seen"):
            ask(seen, ["grass"])


def test_a_region_is_described_by_its_phrase_or_its_mask(predictor: Predictor, pictures: list[Array]) -> None:
    mask = predictor.refer(pictures[0], PHRASES[:1]).masks[0]
    by_phrase, by_mask, everything = predictor.describe(
        pictures[0], [PHRASES[0], mask, np.ones_like(mask)], max_tokens=6
    )
    assert by_phrase.text == by_mask.text
    assert everything.text == predictor.caption(pictures[:1], max_tokens=6)[0].text
    with pytest.raises(ValueError, match="at least one region"):
        predictor.describe(pictures[0], [])
    with pytest.raises(ValueError, match=r"a region is bool\[40, 70\], this is bool\[70, 40\]"):
        predictor.describe(pictures[0], [mask.T])


def test_the_words_of_a_region_depend_on_it(predictor: Predictor, pictures: list[Array]) -> None:
    left = np.zeros(pictures[0].shape[:2], dtype=bool)
    left[:, :10] = True
    seen = predictor.see(pictures[:1])
    looked: list[torch.Tensor] = []
    listen = predictor.model.decoder.listen
    predictor.model.decoder.listen = lambda *x: (looked.append(x[-1]), listen(*x))[1]  # type: ignore[assignment, func-returns-value, misc]
    try:
        predictor.describe(seen, [left, ~left], max_tokens=2)
    finally:
        del predictor.model.decoder.listen
    (region,) = looked
    assert region.shape == (2, 32, 32)
    assert region[0].all(0).tolist() == [column * 70 < 10 * 32 for column in range(32)]


def test_regions_of_many_pictures_are_ranked_by_a_text(predictor: Predictor, pictures: list[Array]) -> None:
    found = predictor.find(pictures, "the red square")
    assert sorted(found.ranking.tolist()) == [0, 1] and found.scores[0] >= found.scores[1]
    for place, picture in enumerate(found.ranking):
        region = predictor.refer(pictures[picture], ["the red square"])
        np.testing.assert_array_equal(found.masks[place], region.masks[0])
        whole = predictor.retrieve([pictures[picture]], ["the red square"]).scores[0, 0]
        assert found.scores[place] == pytest.approx((region.scores[0] + whole) / 2, abs=1e-5)
    assert isinstance(found.draw(), Image.Image)
    assert json.loads(json.dumps(found.to_json()))["regions"][0]["image"] == found.ranking[0]


def test_rankings_draw_themselves(predictor: Predictor, pictures: list[Array]) -> None:
    drawn = predictor.retrieve(pictures, ["a red square", "grass"]).draw()
    assert isinstance(drawn, Image.Image) and drawn.width >= 360


def test_synonyms_stand_between_commas(predictor: Predictor, pictures: list[Array]) -> None:
    result = predictor.semantic(pictures[:1], ["zebra, striped horse", "grass"])[0]
    assert result.names == ("zebra, striped horse", "grass")
    embedded = embed_classes(predictor.model, result.names)
    alone = torch.nn.functional.normalize(
        predictor.model.encode_texts(["zebra", "striped horse"]).sentence, dim=-1
    )
    torch.testing.assert_close(embedded[0], torch.nn.functional.normalize(alone.mean(0), dim=0))


def test_class_lists_are_embedded_once_as_long_as_the_weights_stay() -> None:
    of, cache = model().requires_grad_(False), TextCache(most_names=5)
    passed: list[int] = []
    hook = of.text.register_forward_pre_hook(lambda _, ids: passed.append(len(ids[0])))
    three, four = ("a", "b", "c"), ("d", "e", "f", "g")
    first = cache.classes(of, three)
    assert torch.equal(cache.classes(of, three), first) and len(passed) == 1
    torch.testing.assert_close(first, embed_classes(of, three))
    passed.clear()
    cache.classes(of, four)
    cache.classes(of, three)
    assert len(passed) == 2, "seven names are more than are kept"
    of.text.project.weight.neg_()
    assert not torch.allclose(cache.classes(of, three), first)
    of.load_state_dict(model(1).state_dict())
    torch.testing.assert_close(cache.classes(of, three), embed_classes(of, three))
    hook.remove()


def test_other_weights_are_noticed_wherever_texts_are_kept(pictures: list[Array]) -> None:
    changed = Predictor(model(), CARD)
    before = {name: ask(changed, pictures[0]).to_json() for name, ask in ASK.items()}
    changed.model.load_state_dict(model(1).state_dict())
    fresh = Predictor(model(1), CARD)
    after = {name: ask(changed, pictures[0]).to_json() for name, ask in ASK.items()}
    assert after == {name: ask(fresh, pictures[0]).to_json() for name, ask in ASK.items()} != before
    torch.testing.assert_close(changed._task("panoptic", 1), fresh._task("panoptic", 1))


def test_a_model_made_in_inference_mode_answers(predictor: Predictor, pictures: list[Array]) -> None:
    with torch.inference_mode():
        made = Predictor(model(), CARD)
        assert made.semantic(pictures[:1])[0].to_json() == predictor.semantic(pictures[:1])[0].to_json()
        made.model.load_state_dict(model(1).state_dict())
    fresh = Predictor(model(1), CARD)
    assert made.semantic(pictures[:1])[0].to_json() == fresh.semantic(pictures[:1])[0].to_json()


@pytest.mark.parametrize("count", [847, 20_000])
def test_long_class_lists_pass_in_chunks(count: int, pictures: list[Array]) -> None:
    predictor = Predictor(model().requires_grad_(False), CARD)
    names = tuple(f"{'very ' * (i % 5)}{COMMON[i % 100]} {COMMON[i // 100]}" for i in range(count))
    rows: list[int] = []
    hook = predictor.model.text.blocks[0].register_forward_pre_hook(lambda _, x: rows.append(len(x[0])))
    result = predictor.panoptic(pictures[:1], names, object_threshold=0)[0]
    assert result.names == names and sum(rows) == count + 1 and max(rows) <= 1024
    rows.clear()
    embedded = predictor._texts.classes(predictor.model, names)
    assert not rows and embedded.shape == (count + 1, MODEL.width)
    hook.remove()
    for i in (0, count // 2, count - 1):
        torch.testing.assert_close(embedded[i], embed_classes(predictor.model, names[i : i + 1])[0])
