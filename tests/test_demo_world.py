"""Laws of the synthetic world: its files agree, its texts are true, and it cannot be guessed."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.corpora.readers import read, taxonomies
from pipelines.corpora.rows import Row
from pipelines.demo import MARKER, write
from pipelines.demo_scenes import COLOURS, LEAST_VISIBLE, SHAPES, STUFF, THINGS, Scene, Thing, make_scene
from pipelines.demo_texts import RELATIONS, captions, phrases, questions
from schemas.jobs import CorpusConfig, DemoConfig
from schemas.masks import area_and_bbox, decode_rle, rgb_to_ids

CONFIG = DemoConfig(train_scenes=20, val_scenes=8, train_pairs=40, val_pairs=8)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> tuple[CorpusConfig, ...]:
    return write(CONFIG, tmp_path_factory.mktemp("world") / "corpora")


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(np.random.default_rng([7, i]), 64) for i in range(300)]


def rows(corpora: tuple[CorpusConfig, ...], form: str, split: str) -> list[Row]:
    (corpus,) = [c for c in corpora if (c.format, c.split) == (form, split)]
    items = list(read(corpus))
    assert all(isinstance(item, Row) for item in items), items
    return [item for item in items if isinstance(item, Row)]


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------ files


def test_equal_settings_give_equal_bytes(corpora: tuple[CorpusConfig, ...], tmp_path: Path) -> None:
    write(CONFIG, tmp_path)
    assert contents(tmp_path) == contents(Path(corpora[0].root))


def test_another_seed_gives_other_images(corpora: tuple[CorpusConfig, ...], tmp_path: Path) -> None:
    write(CONFIG.model_copy(update={"seed": 1}), tmp_path)
    name = "images/train/000100000000.jpg"
    assert (tmp_path / name).read_bytes() != (Path(corpora[0].root) / name).read_bytes()


def test_more_scenes_keep_the_first_ones(corpora: tuple[CorpusConfig, ...], tmp_path: Path) -> None:
    write(CONFIG.model_copy(update={"train_scenes": 24}), tmp_path)
    few, more = contents(Path(corpora[0].root) / "images"), contents(tmp_path / "images")
    assert len(more) == len(few) + 4
    assert few.items() <= more.items()


def test_a_finished_world_is_kept_and_another_one_replaces_it(tmp_path: Path) -> None:
    small = DemoConfig(train_scenes=3, val_scenes=2, train_pairs=2, val_pairs=1)
    write(small, tmp_path)
    image = tmp_path / "images/train/000100000000.jpg"
    written = image.stat().st_mtime_ns
    write(small, tmp_path)
    assert image.stat().st_mtime_ns == written
    write(small.model_copy(update={"train_scenes": 1}), tmp_path)
    assert [p.name for p in (tmp_path / "images/train").iterdir()] == [image.name]


def test_an_interrupted_world_is_finished(tmp_path: Path) -> None:
    small = DemoConfig(train_scenes=2, val_scenes=1, train_pairs=1, val_pairs=1)
    write(small, tmp_path)
    whole = contents(tmp_path)
    settings = json.loads((tmp_path / MARKER).read_text())
    (tmp_path / MARKER).write_text(json.dumps(settings | {"finished": False}))
    (tmp_path / "annotations/instances.json").unlink()
    write(small, tmp_path)
    assert contents(tmp_path) == whole


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    photo = tmp_path / "images" / "holiday.jpg"
    photo.parent.mkdir()
    photo.write_bytes(b"precious")
    (tmp_path / MARKER).write_bytes(b"{}")
    with pytest.raises(ValueError, match="not a demo world; choose an empty"):
        write(CONFIG, tmp_path)
    assert contents(tmp_path) == {"images/holiday.jpg": b"precious", MARKER: b"{}"}


def test_what_is_called_unseen_must_be_a_thing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="some of red circle, .*pink cross"):
        write(DemoConfig(unseen=("pink cross",)), tmp_path)
    assert not contents(tmp_path)


# ------------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize("split", ["train", "val"])
def test_label_maps_agree_with_their_segments(corpora: tuple[CorpusConfig, ...], split: str) -> None:
    for row in rows(corpora, "coco_panoptic", split):
        assert row.segments and row.labels_path
        ids = rgb_to_ids(np.asarray(Image.open(row.labels_path)))
        assert ids.shape == (row.height, row.width) == Image.open(row.image_path).size[::-1]
        assert set(np.unique(ids)) - {0} == {segment.id for segment in row.segments}
        for segment in row.segments:
            assert area_and_bbox(ids == segment.id) == (segment.area, segment.bbox)
            assert segment.isthing == (segment.category in THINGS)


def test_referred_masks_are_segments_of_the_same_image(corpora: tuple[CorpusConfig, ...]) -> None:
    panoptic = {row.image_path: row for row in rows(corpora, "coco_panoptic", "train")}
    referred = rows(corpora, "refcoco", "train")
    assert len(referred) >= 5
    for row in referred:
        ids = rgb_to_ids(np.asarray(Image.open(str(panoptic[row.image_path].labels_path))))
        for referring in row.referring:
            (segment_id,) = np.unique(ids[decode_rle(referring.mask)])
            (segment,) = [s for s in panoptic[row.image_path].segments or () if s.id == segment_id]
            assert (
                segment.isthing and not segment.iscrowd and segment.area == decode_rle(referring.mask).sum()
            )


def test_captions_and_questions_are_about_the_same_images_and_no_others(
    corpora: tuple[CorpusConfig, ...],
) -> None:
    for split in ("train", "val"):
        captioned = {row.image_path for row in rows(corpora, "captions_table", split)}
        assert captioned == {row.image_path for row in rows(corpora, "vqa_v2", split)}
        assert not captioned & {row.image_path for row in rows(corpora, "coco_panoptic", split)}


def test_unseen_classes_have_no_mask_in_training_but_are_named_there(
    corpora: tuple[CorpusConfig, ...],
) -> None:
    segments = [s.category for row in rows(corpora, "coco_panoptic", "train") for s in row.segments or ()]
    phrases_ = [s for row in rows(corpora, "refcoco", "train") for r in row.referring for s in r.sentences]
    texts = [caption for row in rows(corpora, "captions_table", "train") for caption in row.captions]
    (declared,) = taxonomies(corpora[0])
    unseen = DemoConfig().unseen
    assert declared and set(unseen) <= set(declared.names)
    for name in unseen:
        assert name not in segments
        assert not any(name in phrase for phrase in phrases_)
        assert any(name in text for text in texts)
        colour, shape = name.split()
        assert any(s.startswith(colour) for s in segments) and any(s.endswith(shape) for s in segments)


# ------------------------------------------------------------------------------------------ scenes


@pytest.mark.parametrize("size", [32, 100, 192])
def test_a_scene_looks_the_same_at_any_size(size: int) -> None:
    same = []
    for i in range(20):
        scene, usual = (make_scene(np.random.default_rng([3, i]), side) for side in (size, 64))
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert {thing.mask.shape for thing in scene.things} == {(size, size)}
        # a thing that just fits at one size may be drawn elsewhere at another
        shares = [[thing.mask.mean() for thing in s.things] for s in (scene, usual)]
        same.append(all(abs(a - b) < 0.02 for a, b in zip(*shares, strict=False)))
    assert np.mean(same) > 0.7


def test_masks_never_overlap_and_mostly_cover(scenes: list[Scene]) -> None:
    void = []
    for scene in scenes:
        masks = [thing.mask for thing in scene.things] + [ground.mask for ground in scene.ground]
        covered = np.sum(masks, axis=0)
        assert covered.max() == 1 and all(mask.any() for mask in masks)
        void.append((covered == 0).mean())
    assert 0.2 < np.mean(np.array(void) > 0) < 0.4
    assert 0.005 < np.mean(void) < 0.05


def test_scenes_vary_as_promised(scenes: list[Scene]) -> None:
    things = [thing for scene in scenes for thing in scene.things]
    numbers = Counter(sum(not thing.crowd for thing in scene.things) for scene in scenes)
    assert set(numbers) <= {0, 1, 2, 3, 4} and min(numbers[n] for n in (1, 2, 3, 4)) > 15
    assert {thing.name for thing in things} == set(THINGS)
    assert {ground.name for scene in scenes for ground in scene.ground} == set(STUFF)
    assert 0.03 < np.mean([any(thing.crowd for thing in scene.things) for scene in scenes]) < 0.15
    widths = [area_and_bbox(thing.mask)[1][2] for thing in things if not thing.crowd]
    assert np.percentile(widths, 10) < 14 and np.percentile(widths, 90) > 24
    assert 1.6 < np.mean([len({thing.name for thing in scene.things}) for scene in scenes]) < 2.1
    repeated = [len({thing.name for thing in scene.things}) < len(scene.things) for scene in scenes]
    assert np.mean(repeated) > 0.5, "equal things are what the task tokens differ in"


def test_what_is_left_of_a_covered_thing_is_enough() -> None:
    # the smallest shape of the smallest size, at the least visible share
    least = LEAST_VISIBLE * 81 * 0.35
    scenes = [make_scene(np.random.default_rng([11, i]), 64) for i in range(100)]
    assert min(thing.area for scene in scenes for thing in scene.things) >= least


# ------------------------------------------------------------------------------------------ texts


def fitting(scene: Scene, phrase: str) -> list[Thing]:
    """Things that a phrase fits, by reading it word by word: a second opinion, not the generator's."""
    words = phrase.removeprefix("the ").split()
    extreme = words.pop(0) if words[0] in ("leftmost", "rightmost", "top", "bottom", "large", "small") else ""
    split = next((i for i, w in enumerate(words) if w in ("left", "right", "above", "below")), len(words))
    found = named(scene, words[:split])
    if split < len(words):
        relation = " ".join(words[split : words.index("the")])
        (anchor,) = named(scene, words[words.index("the") + 1 :])
        found = [thing for thing in found if RELATIONS[relation](thing, anchor) > 0]
    keys = {
        "leftmost": lambda t: t.x,
        "rightmost": lambda t: -t.x,
        "top": lambda t: t.y,
        "bottom": lambda t: -t.y,
        "large": lambda t: -t.area,
        "small": lambda t: t.area,
    }
    return sorted(found, key=keys[extreme])[:1] if extreme else found


def named(scene: Scene, words: list[str]) -> list[Thing]:
    colour = next((w for w in words if w in COLOURS), None)
    shape = next((w for w in words if w in SHAPES), None)
    return [t for t in scene.things if colour in (None, t.colour) and shape in (None, t.shape)]


def said(scenes: list[Scene]) -> Iterator[tuple[Scene, Thing, str, bool]]:
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            for phrase in phrases(np.random.default_rng([i]), scene, thing):
                yield scene, thing, phrase.text, phrase.relation


def test_every_phrase_fits_its_thing_and_no_other(scenes: list[Scene]) -> None:
    for scene, thing, text, _ in said(scenes):
        (found,) = fitting(scene, text)
        assert found is thing, text


def test_a_third_of_the_phrases_need_their_relation(scenes: list[Scene]) -> None:
    need = []
    for scene, _, text, relation in said(scenes):
        noun = text.split(" left of ")[0].split(" right of ")[0].split(" above ")[0].split(" below ")[0]
        assert relation == (noun != text)
        need.append(relation and len(fitting(scene, noun)) > 1)
    assert len(need) > 500 and np.mean(need) >= 1 / 3


def test_captions_name_every_class_with_its_count(scenes: list[Scene]) -> None:
    words = {1: "a", 2: "two", 3: "three", 4: "four"}
    for i, scene in enumerate(scenes):
        first, second = captions(np.random.default_rng([i]), scene)
        assert first != second
        for text in (first, second):
            for name in THINGS:
                found = [thing for thing in scene.things if thing.name == name]
                assert (name in text) == bool(found)
                if found and not found[0].crowd:
                    assert f"{words[len(found)]} {name}" in text
            assert all((name in text) == (name in {g.name for g in scene.ground}) for name in STUFF)


def test_no_constant_caption_scores(scenes: list[Scene]) -> None:
    truths = [{thing.name for thing in scene.things} for scene in scenes]
    ranking = [name for name, _ in Counter(name for truth in truths for name in truth).most_common()]
    scores = [
        np.mean([2 * len(truth & set(ranking[:k])) / (len(truth) + k) for truth in truths])
        for k in range(1, len(ranking) + 1)
    ]
    assert max(scores) <= 0.25


def test_answers_are_true_and_balanced(scenes: list[Scene]) -> None:
    answers: dict[str, Counter[str]] = {}
    for i, scene in enumerate(scenes):
        for asked in questions(np.random.default_rng([i]), scene):
            answers.setdefault(asked.kind, Counter())[asked.answer] += 1
            assert answer(scene, asked.question) == asked.answer, asked
    assert set(answers) == {"what color is the", "how many", "is there a", "is the"}
    assert set(answers["how many"]) == {"0", "1", "2", "3", "4"}
    assert answers["how many"].most_common(1)[0][1] < 0.4 * answers["how many"].total()
    assert answers["what color is the"].most_common(1)[0][1] < 0.3 * answers["what color is the"].total()
    assert 0.4 < answers["is there a"]["yes"] / answers["is there a"].total() < 0.6
    assert answers["is the"]["yes"] == answers["is the"]["no"]
    assert 3 < sum(count.total() for count in answers.values()) / len(scenes) < 5


def answer(scene: Scene, question: str) -> str:
    """A second opinion, from the words of the question."""
    singular = question.rstrip("?").replace("crosses", "cross")
    words = [word.removesuffix("s") if word[:-1] in (*SHAPES, "shape") else word for word in singular.split()]
    if words[0] == "what":
        (thing,) = named(scene, words)
        return thing.colour
    if words[:2] == ["how", "many"]:
        return str(len(named(scene, words)))
    if words[:2] == ["is", "there"]:
        return "yes" if named(scene, words) else "no"
    relation = "left of" if "left" in words else "above"
    where = words.index("left" if "left" in words else "above")
    (first,), (second,) = named(scene, words[:where]), named(scene, words[where:])
    return "yes" if RELATIONS[relation](first, second) > 0 else "no"
