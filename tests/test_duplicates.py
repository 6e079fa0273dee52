"""Copies are found whatever was done to them, pictures that are only alike are not, and order is nothing."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from benchmarks.leakage import VARIANTS, clean_looks, looks, made_up, mirror, photographs, plant, stored
from pipelines import duplicates
from pipelines.demo_scenes import make_scene
from pipelines.duplicates import RADIUS, HashIndex, find_copies, hashes
from pipelines.grouping import LEAKED_COPY, LEAKED_NUMBER, NEAR_DUPLICATE, LightRows, group
from pipelines.inspection import fingerprint
from schemas.masks import Array

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    return [made_up(np.random.default_rng((seed, i))) for i in range(count)]


# -------------------------------------------------------------------------------------------------- search


def test_every_hash_within_the_radius_is_found_and_no_other() -> None:
    chance = np.random.default_rng(0)
    hashed = chance.integers(0, 2**63, 300, dtype=np.uint64)
    flips = [chance.choice(63, RADIUS + i % 2, replace=False) for i in range(300)]
    queries = hashed ^ np.array([sum(1 << int(bit) for bit in bits) for bits in flips], dtype=np.uint64)
    query, row, bits = joined(HashIndex(hashed).within(queries))
    plain = np.bitwise_count(queries[:, None] ^ hashed)
    expected = np.nonzero(plain <= RADIUS)
    assert len(query) >= 150
    assert {*zip(query.tolist(), row.tolist(), strict=True)} == {
        *zip(*(side.tolist() for side in expected), strict=True)
    }
    assert (bits == plain[query, row]).all()


def joined(pieces: Iterable[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
    query, row, bits = (np.concatenate(column) for column in zip(*pieces, strict=True))
    order = np.lexsort((row, query))
    return query[order], row[order], bits[order]


def test_equal_hashes_of_many_images_are_compared_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = np.zeros(300, dtype=np.uint64)
    whole = joined(HashIndex(hashed).within(hashed))
    monkeypatch.setattr(duplicates, "_PAIRS", 1000)
    monkeypatch.setattr(duplicates, "_CHUNK", 64)
    pieces = list(HashIndex(hashed).within(hashed))
    assert max(len(query) for query, _, _ in pieces) <= 1000
    assert len(whole[0]) == 300**2
    assert all((a == b).all() for a, b in zip(whole, joined(pieces), strict=True))


def test_what_is_done_is_not_looked_up_from_the_next_piece_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_PAIRS", 900)
    hashed, done, asked = np.zeros(300, dtype=np.uint64), np.zeros(300, dtype=bool), []
    for query, _, _ in HashIndex(hashed).within(hashed, done):
        asked += np.unique(query).tolist()
        done[1:299] = True
    assert asked == [0, 299]


# ---------------------------------------------------------------------------------------- what is a copy


def test_planted_copies_are_found_and_clean_images_kept() -> None:
    planted = plant(pictures(24), clean_looks([], 400, seed=1), seed=2)
    assert planted.found == dict.fromkeys(VARIANTS, 24)
    assert planted.lost == 0 and planted.num_clean == 400


@pytest.mark.skipif(not (SHARED / "data/coco").is_dir(), reason="needs the shared COCO photographs")
def test_planted_copies_of_real_photographs_are_found() -> None:
    real = photographs(SHARED / "data/coco/images")[:40]
    planted = plant(real, clean_looks(real, 60, seed=1), seed=3)
    assert min(planted.found.values()) >= 39 and planted.lost == 0


def test_an_evaluation_image_that_is_a_crop_of_a_training_image_is_found_too() -> None:
    crop, _ = VARIANTS["5 % off every side"]
    chance = np.random.default_rng(0)
    whole = pictures(12)
    seen = np.concatenate([looks([crop(image, chance) for image in whole]), looks(whole)])
    assert find_copies(hashes(seen), seen, np.arange(24) < 12)[12:].tolist() == list(range(12))


def test_scenes_of_one_world_are_not_taken_for_copies() -> None:
    """Thousands of the same shapes on the same grounds; 7000 were tried, see benchmarks/README.md."""
    seen = looks(Image.fromarray(make_scene(np.random.default_rng((5, i)), 64).image) for i in range(600))
    assert (find_copies(hashes(seen), seen, np.arange(600) < 200) == -1).all()


def test_one_picture_in_other_colours_or_with_another_object_is_no_copy() -> None:
    """The hash sees neither; a grey copy is one."""
    image = pictures(1)[0]
    tones, pixels = np.array(image.convert("YCbCr")), np.array(image)
    recoloured = Image.fromarray(tones[:, :, [0, 2, 1]], "YCbCr").convert("RGB")
    pixels[60:80, 80:100] = (250, 240, 20)
    faded = image.convert("L").point(lambda value: value * 0.6 + 51)
    seen = looks([image, recoloured, Image.fromarray(pixels), faded, image.convert("L")])
    place, plain = np.tile([1.0, 0, 1, 0], (4, 1)), np.zeros(4, dtype=np.int64)
    same = duplicates.verify(seen, np.arange(1, 5), plain, plain.astype(bool), place)
    assert same.tolist() == [False, False, False, True]
    assert find_copies(hashes(seen), seen, np.arange(5) < 1).tolist() == [-1, -1, -1, -1, 0]


@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_images_have_no_look(level: int) -> None:
    flat = Image.fromarray(np.full((50, 70, 3), level, np.uint8))
    speckles = np.random.default_rng(0).integers(0, 2, (50, 70, 3), np.uint8)
    speckled = Image.fromarray(np.array(flat) // 2 + speckles)
    assert fingerprint(flat) == fingerprint(speckled) == (b"", 0)


def test_smooth_gradients_of_other_strength_are_no_copies() -> None:
    ramp = np.linspace(0, 1, 64)[None, :, None] * np.ones((48, 1, 3))
    images = [
        Image.fromarray((start + ramp * rise).astype(np.uint8))
        for start, rise in ((0, 200), (60, 90), (30, 20))
    ]
    seen = looks(images)
    assert (find_copies(hashes(seen), seen, np.arange(3) < 1) == -1).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "I;16"])
def test_the_mode_of_a_file_changes_no_look(mode: str) -> None:
    image = pictures(1)[0].convert("L")
    sixteen = Image.fromarray(np.asarray(image).astype(np.uint16) * 256)
    other = sixteen if mode == "I;16" else image.convert(mode)
    one, two = (np.frombuffer(fingerprint(i)[0], np.uint8).astype(int) for i in (image, other))
    assert np.abs(one - two).max() <= 4


# ------------------------------------------------------------------------------------------- decisions


def light(looked: Array, **columns: object) -> LightRows:
    """One row an image, all of one corpus."""
    count = len(looked)
    base = {
        "part": np.zeros(count, np.int32),
        "row": np.arange(count, dtype=np.int32),
        "corpus": np.zeros(count, np.int32),
        "held_out": np.zeros(count, bool),
        "image_high": looked[:, 100:108].copy().view("<u8")[:, 0],  # as good as a hash of the bytes
        "image_low": np.zeros(count, np.uint64),
        "number": np.zeros(count, np.uint64),
        "look": hashes(looked),
        "worth": np.zeros(count, np.int8),
        "pixels": np.full(count, 9),
        "tie": np.zeros(count, np.uint64),
        "labelled": np.zeros(count, bool),
        "key": pa.array([f"c-{look[:9].tobytes().hex()}" for look in looked]),
    }
    return LightRows(**(base | columns))  # type: ignore[arg-type]


def test_copies_leave_training_are_marked_or_refused_whatever_their_order() -> None:
    images = pictures(6)
    copies = [stored(mirror(image, np.random.default_rng(0)), 60) for image in images[:4]]
    seen = looks([*images, *copies])  # 0 and 1 are held out: 6 and 7 leak; 8 and 9 are copies of 2 and 3
    held_out, pixels = np.arange(10) < 2, np.where(np.arange(10) < 6, 9, 4)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(10)
        rows = light(seen[order], held_out=held_out[order], pixels=pixels[order])
        kept = group(rows, seen[order], near_duplicates="keep")
        assert sorted(order[kept.refused].tolist()) == [6, 7]
        assert kept.why.tolist() == [LEAKED_COPY] * 2
        assert order[kept.because].tolist() == (order[kept.refused] - 6).tolist()
        origin = dict(zip(order[kept.members].tolist(), kept.copy_of.to_pylist(), strict=True))
        keys = dict(zip(order.tolist(), rows.key.to_pylist(), strict=True))
        assert origin == {i: {8: keys[2], 9: keys[3]}.get(i, "") for i in (0, 1, 2, 3, 4, 5, 8, 9)}
        refused = group(rows, seen[order], near_duplicates="reject")
        assert sorted(order[refused.members].tolist()) == [0, 1, 2, 3, 4, 5]
        assert sorted(refused.why.tolist()) == [LEAKED_COPY] * 2 + [NEAR_DUPLICATE] * 2


def test_the_better_annotated_copy_is_kept() -> None:
    image = pictures(1)[0]
    seen = looks([image, stored(image, 60)])
    rows = light(seen, worth=np.array([2, 0], np.int8))
    assert group(rows, seen, near_duplicates="reject").members.tolist() == [1]


def test_an_image_with_the_number_of_an_evaluation_image_leaves_training() -> None:
    """And so does what looks like it, whatever it is numbered."""
    image, other, unlike = pictures(3)
    seen = looks([image, other, stored(other, 60), unlike])
    number = np.array([7, 7, 9, 0], np.uint64)
    rows = light(seen, number=number, held_out=np.arange(4) < 1)
    found = group(rows, seen, near_duplicates="keep")
    reasons = dict(zip(found.refused.tolist(), found.why.tolist(), strict=True))
    assert reasons == {1: LEAKED_NUMBER, 2: LEAKED_COPY}
    assert found.because[found.refused == 1].tolist() == [0]


def test_what_only_resembles_a_copy_is_no_copy() -> None:
    """A is like B, B like C, A not like C: B goes, C stays."""

    def settled(pairs: list[tuple[int, int]]) -> list[int]:
        copy_of = np.full(3, -1, dtype=np.int64)
        one, two = np.array(pairs).T
        duplicates._settle(copy_of, one, two, lambda tried: np.ones(len(tried), dtype=bool))
        return copy_of.tolist()

    assert settled([(0, 1), (1, 2)]) == settled([(1, 2), (0, 1)]) == [-1, 0, -1]
    assert settled([(0, 2), (1, 2)]) == settled([(1, 2), (0, 2)]) == [-1, -1, 0]


@pytest.mark.parametrize("pieces", [1 << 20, 500])
@pytest.mark.parametrize("held_out", [0, 7])
def test_many_pictures_of_one_hash_are_settled_as_if_all_pairs_were_compared(
    monkeypatch: pytest.MonkeyPatch, held_out: int, pieces: int
) -> None:
    """Likeness is made up here, and is not transitive."""
    count, chance = 120, np.random.default_rng(0)
    alike = np.triu(chance.random((count, count)) < 0.1, 1)
    compared = []

    def verify(thumbnails: Array, one: Array, two: Array, mirrored: Array, maps: Array) -> Array:
        compared.extend(zip(two.tolist(), one.tolist(), strict=True))
        return (alike | alike.T)[one, two] & ~mirrored

    monkeypatch.setattr(duplicates, "verify", verify)
    monkeypatch.setattr(duplicates, "_PAIRS", pieces)
    seen = np.repeat(looks(pictures(1)), count, axis=0)
    is_held = np.isin(np.arange(count), chance.permutation(count)[:held_out])
    expected = np.full(count, -1)
    for other in np.flatnonzero(~is_held).tolist():
        leaks = np.flatnonzero(is_held & (alike | alike.T)[other])
        expected[other] = leaks[0] if len(leaks) else -1
    for other in np.flatnonzero(expected < 0).tolist():
        lower = np.flatnonzero(~is_held & (expected < 0) & alike[:, other])
        if not is_held[other] and len(lower):
            expected[other] = lower[0]
    assert find_copies(hashes(seen), seen, is_held).tolist() == expected.tolist()
    assert len(compared) == len(set(compared))


def test_copies_of_one_picture_are_each_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many: with all others they are equal to, it would be hours for ten thousand."""
    aligned, verify = [], duplicates.verify
    monkeypatch.setattr(duplicates, "verify", lambda *of: aligned.append(len(of[1])) or verify(*of))
    seen = np.repeat(looks(pictures(1)), 3000, axis=0)
    assert find_copies(hashes(seen), seen, np.zeros(3000, bool)).tolist() == [-1] + [0] * 2999
    assert find_copies(hashes(seen), seen, np.arange(3000) == 5).tolist() == [5] * 5 + [-1] + [5] * 2994
    assert sum(aligned) == 2 * 2999


@pytest.mark.parametrize("held_out", [0, 3])
def test_a_dataset_without_training_or_without_evaluation_is_no_special_case(held_out: int) -> None:
    seen = looks(pictures(3))
    assert find_copies(hashes(seen), seen, np.arange(3) < held_out).tolist() == [-1] * 3
    assert len(find_copies(hashes(seen[:0]), seen[:0], np.zeros(0, bool))) == 0
