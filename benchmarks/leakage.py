"""Are evaluation images found in a training corpus as altered copies, and is a clean image ever lost?

    python -m benchmarks.leakage plant [PATH/coco/images] [--evaluation 200] [--clean 10000]
    python -m benchmarks.leakage search [--images 100000 1000000] [--held-out 5000]
    python -m benchmarks.leakage alike [--images 1000 10000]

`plant` makes one altered copy of every evaluation image in each of the ways of `VARIANTS` and puts them among
clean images. Evaluation images are the photographs of the folder, then made-up ones; clean ones are the
photographs' left halves (another picture than the whole), made-up photographs, and scenes of the demo world,
in equal parts of the last two. `search` times hashes that are made up: nothing resembles anything. `alike`
times the contrary: every image is the first one, but for noise as of another encoder.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from pipelines.demo_scenes import make_scene
from pipelines.duplicates import THUMBNAIL_BYTES, find_copies, hashes
from pipelines.inspection import fingerprint
from schemas.masks import Array

Rng = np.random.Generator
Variant = Callable[[Image.Image, Rng], Image.Image]
SIZE = (200, 150)  # pixels of the made-up photographs; chosen by us, small so that many are made


def crop(left: float, top: float, right: float, bottom: float) -> Variant:
    """Cut shares of the width and height away."""

    def cut(image: Image.Image, chance: Rng) -> Image.Image:
        w, h = image.size
        return image.crop((round(left * w), round(top * h), w - round(right * w), h - round(bottom * h)))

    return cut


def resize(scale: float) -> Variant:
    return lambda image, chance: image.resize((round(image.width * scale), round(image.height * scale)))


def mirror(image: Image.Image, chance: Rng) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def any_crop(image: Image.Image, chance: Rng) -> Image.Image:
    return crop(*chance.uniform(0, 0.05, 4).tolist())(image, chance)


def all_of(*parts: Variant) -> Variant:
    def altered(image: Image.Image, chance: Rng) -> Image.Image:
        for part in parts:
            image = part(image, chance)
        return image

    return altered


def same(image: Image.Image, chance: Rng) -> Image.Image:
    return image


# How the copy is altered, and the quality of the JPEG that it is then stored as.
VARIANTS: Mapping[str, tuple[Variant, int]] = {
    "quality 30": (same, 30),
    "quality 50": (same, 50),
    "half the size": (resize(0.5), 75),
    "twice the size": (resize(2), 75),
    "mirrored": (mirror, 75),
    "5 % off the left": (crop(0.05, 0, 0, 0), 75),
    "5 % off the top": (crop(0, 0.05, 0, 0), 75),
    "5 % off the right": (crop(0, 0, 0.05, 0), 75),
    "5 % off the bottom": (crop(0, 0, 0, 0.05), 75),
    "5 % off every side": (crop(0.05, 0.05, 0.05, 0.05), 75),
    "2.5 % off every side": (crop(0.025, 0.025, 0.025, 0.025), 75),
    "up to 5 % off each side": (any_crop, 75),
    "all at once": (all_of(any_crop, resize(0.5), mirror), 50),
}


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Found copies by variant, of how many; clean images lost, of how many."""

    found: dict[str, int]
    num_planted: int
    lost: int
    num_clean: int


def plant(evaluation: Sequence[Image.Image], clean: Array, seed: int) -> Planted:
    """clean: uint8[N, 1152] thumbnails of images that are copies of none."""
    chance = np.random.default_rng(seed)
    held_out = looks(evaluation)
    copies = {
        name: looks(stored(alter(image, chance), quality) for image in evaluation)
        for name, (alter, quality) in VARIANTS.items()
    }
    seen = np.concatenate([held_out, clean, *copies.values()])
    is_held = np.arange(len(seen)) < len(held_out)
    copy_of = find_copies(hashes(seen), seen, is_held)
    start = len(held_out) + len(clean)
    found = copy_of[start:].reshape(len(VARIANTS), -1)
    return Planted(
        found=dict(zip(VARIANTS, (found == np.arange(len(held_out))).sum(1).tolist(), strict=True)),
        num_planted=len(held_out),
        lost=int((copy_of[len(held_out) : start] >= 0).sum()),
        num_clean=len(clean),
    )


def looks(images: Iterator[Image.Image] | Sequence[Image.Image]) -> Array:
    """The thumbnails of images, uint8[n, 1152]; of a flat one zeros."""
    flat = bytes(THUMBNAIL_BYTES)
    found = b"".join(fingerprint(image)[0] or flat for image in images)
    return np.frombuffer(found, np.uint8).reshape(-1, THUMBNAIL_BYTES)


def stored(image: Image.Image, quality: int) -> Image.Image:
    """What a JPEG of this quality gives back."""
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=quality)
    return Image.open(sink)


def photographs(folder: Path) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]


def made_up(chance: Rng) -> Image.Image:
    """Colour noise with the 1 / f spectrum of photographs, a horizon, and blurred ellipses in front."""
    w, h = SIZE
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(w), np.fft.fftfreq(h)))
    frequency[0, 0] = 1
    phases = np.fft.fft2(chance.normal(size=(3, h, w))) / frequency
    noise = np.real(np.fft.ifft2(phases))
    noise = 128 + chance.uniform(15, 50) * noise / noise.std((1, 2), keepdims=True)
    y, x = np.mgrid[:h, :w]
    ground = (y > chance.uniform(0.3, 0.8) * h)[None] * chance.uniform(-60, 60, (3, 1, 1))
    picture = noise + ground
    for _ in range(int(chance.integers(1, 5))):
        centre, radius = chance.uniform((0, 0), (w, h)), chance.uniform(10, 50, 2)
        inside = ((x - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2 < 1
        mask = gaussian_filter(inside.astype(float), 1)
        picture = picture * (1 - mask) + mask * (chance.uniform(0, 255, (3, 1, 1)) + 0.3 * (noise - 128))
    return Image.fromarray(np.moveaxis(picture.clip(0, 255).astype(np.uint8), 0, 2))


def scene(chance: Rng) -> Image.Image:
    return Image.fromarray(make_scene(chance, 64).image)


def clean_looks(real: Sequence[Image.Image], count: int, seed: int) -> Array:
    """The thumbnails of `count` images: left halves of the real ones, then made-up ones and scenes."""
    halves = [image.crop((0, 0, image.width // 2, image.height)) for image in real]
    made = ((made_up, scene)[i % 2](np.random.default_rng((seed, i))) for i in range(count - len(halves)))
    return np.concatenate([looks(halves), looks(stored(image, 90) for image in made)])


def search(num_images: int, num_held_out: int) -> str:
    """Find copies among made-up hashes; a line of what it took."""
    chance = np.random.default_rng(0)
    hashed = chance.integers(0, 2**63, num_images, dtype=np.uint64)
    seen = _First(chance.integers(0, 256, (num_held_out, THUMBNAIL_BYTES), dtype=np.uint8))
    started = time.process_time()
    find_copies(hashed, seen, np.arange(num_images) < num_held_out)
    return f"{num_images} images, {num_held_out} held out: {time.process_time() - started:.1f} s of CPU"


def alike(num_images: int) -> str:
    """Find that all are copies of the first; a line of what it took."""
    chance = np.random.default_rng(0)
    noise = chance.integers(-1, 2, (num_images, THUMBNAIL_BYTES))
    seen = (looks([made_up(chance)]) + noise).clip(0, 255).astype(np.uint8)
    started = time.process_time()
    copies = find_copies(hashes(seen), seen, np.zeros(num_images, dtype=bool)) == 0
    return f"{num_images} images, {copies.sum()} copies: {time.process_time() - started:.1f} s of CPU"


class _First:
    """Thumbnails of the held-out images; all others have the first one's."""

    def __init__(self, held_out: Array) -> None:
        self.held_out = held_out

    def __getitem__(self, rows: Array) -> Array:
        return self.held_out[np.where(rows < len(self.held_out), rows, 0)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("plant", "search", "alike"))
    parser.add_argument("folder", nargs="?", type=Path, help="photographs, no two of them alike")
    parser.add_argument("--evaluation", type=int, default=200)
    parser.add_argument("--clean", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, nargs="+")
    parser.add_argument("--held-out", type=int, default=5_000)
    options = parser.parse_args(arguments)
    if options.what == "search":
        for num_images in options.images or (100_000, 1_000_000):
            print(search(num_images, options.held_out), flush=True)
        return
    if options.what == "alike":
        for num_images in options.images or (1_000, 10_000):
            print(alike(num_images), flush=True)
        return
    real = photographs(options.folder) if options.folder else []
    rest = (np.random.default_rng((options.seed, 1, i)) for i in range(options.evaluation - len(real)))
    evaluation = [*real[: options.evaluation], *map(made_up, rest)]
    planted = plant(evaluation, clean_looks(real, options.clean, options.seed), options.seed)
    for name, found in planted.found.items():
        print(f"{name:24} {found} of {planted.num_planted} found")
    print(f"{planted.lost} of {planted.num_clean} clean images lost")


if __name__ == "__main__":
    main()
