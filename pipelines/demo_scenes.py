"""Procedural scenes: coloured shapes on textured ground, with the exact mask of everything. No files.

The unit of length is 1/64 of the image side, so that a scene looks the same at any image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import distance_transform_edt

Array = np.ndarray[Any, Any]
Rng = np.random.Generator

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "green": (28, 190, 80),
    "blue": (36, 70, 222),
    "yellow": (246, 218, 36),
    "purple": (150, 44, 190),
    "orange": (250, 130, 20),
}
SHAPES = ("circle", "square", "cross")
THINGS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
STUFF = ("grass", "water", "sand", "sky", "brick", "snow", "wood", "tiles", "field", "heath")

# Chosen by us, so that a 6 M-parameter model learns this world at 64 px in minutes on two cores.
UNIT = 64
SMALLEST, LARGEST = 11.0, 36.0
NUM_THINGS_SHARES = (0.10, 0.25, 0.30, 0.35)  # of images with 1, 2, 3 and 4 things
# Of things that take the class of an earlier one: many, because telling equal things apart is what
# distinguishes a panoptic answer from a semantic one.
REPEAT_SHARE = 0.55
CROWD_SHARE = 0.08
VOID_SHARE = 0.3
NUM_STUFF_SHARES = (0.35, 0.45, 0.20)  # of images with 1, 2 and 3 kinds of ground
LEAST_VISIBLE = 0.6
ATTEMPTS = 30
VOID_COLOUR = (72, 70, 74)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object, or a crowd of tiny ones.

    mask    bool[S, S], what is visible of it
    x, y    centre of the visible part in [0, 1], origin in the upper left corner
    """

    colour: str
    shape: str
    crowd: bool
    mask: Array
    x: float
    y: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def area(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True, kw_only=True)
class Ground:
    """One kind of stuff; mask bool[S, S], what is visible of it."""

    name: str
    mask: Array


@dataclass(frozen=True, kw_only=True)
class Scene:
    """image uint8[S, S, 3]; the masks of `things` and `ground` are disjoint, what none covers is void."""

    image: Array
    things: tuple[Thing, ...]
    ground: tuple[Ground, ...]


@dataclass(frozen=True, kw_only=True)
class _Placed:
    name: str
    crowd: bool
    outline: Array  # bool[S, S], before anything covers it


def make_scene(rng: Rng, size: int, classes: Sequence[str] = THINGS) -> Scene:
    """A random scene of `size` x `size` pixels whose things are of the given classes."""
    y, x = (np.mgrid[:size, :size] + 0.5) * (UNIT / size)
    regions = _regions(rng, x, y)
    void = _void(rng, x, y)
    image = np.where(void[..., None], np.array(VOID_COLOUR) + _grain(rng, size, 22.0), 0.0)
    for name, region in regions:
        painted = region & ~void
        image[painted] = _texture(name, rng, x, y)[painted]
    placed = _place(rng, x, y, classes)
    for thing in placed:
        colour = np.array(COLOURS[thing.name.split()[0]]) + rng.uniform(-14, 14, 3)
        image[thing.outline] = (colour * _light(thing)[..., None])[thing.outline]
    image += rng.normal(0, 4, image.shape)
    covered = np.any([thing.outline for thing in placed], axis=0) | void
    ground = [Ground(name=name, mask=region & ~covered) for name, region in regions]
    return Scene(
        image=np.clip(image, 0, 255).round().astype(np.uint8),
        things=_visible(placed, x, y),
        ground=tuple(g for g in ground if g.mask.any()),
    )


# ----------------------------------------------------------------------------------------------------- things


def _place(rng: Rng, x: Array, y: Array, classes: Sequence[str]) -> list[_Placed]:
    """Later ones lie in front; one that hides too much of an earlier one is drawn again or left out."""
    placed: list[_Placed] = []
    crowd = [str(rng.choice(classes))] if rng.random() < CROWD_SHARE else []
    single = [
        name for name in classes if name not in crowd
    ]  # so that a class is counted or a crowd, never both
    names = _names(rng, single, 1 + int(rng.choice(4, p=NUM_THINGS_SHARES)))
    for name in crowd + names:
        for _ in range(ATTEMPTS):
            outline = _crowd(rng, x, y, name) if name in crowd else _outline(rng, x, y, name)
            thing = _Placed(name=name, crowd=name in crowd, outline=outline)
            if _fits(thing, placed):
                placed.append(thing)
                break
    return placed


def _fits(thing: _Placed, placed: list[_Placed]) -> bool:
    # two overlapping things of one colour have no edge between them: nobody could tell their masks
    alike = [p for p in placed if p.name.split()[0] == thing.name.split()[0]]
    if any((p.outline & thing.outline).any() for p in alike):
        return False
    return all(share >= LEAST_VISIBLE for share in _visible_shares([*placed, thing]))


def _names(rng: Rng, classes: Sequence[str], number: int) -> list[str]:
    names: list[str] = []
    for _ in range(number):
        repeat = bool(names) and rng.random() < REPEAT_SHARE
        names.append(str(rng.choice(names if repeat else classes)))
    return names


def _outline(rng: Rng, x: Array, y: Array, name: str) -> Array:
    half = (
        SMALLEST / 2 * (LARGEST / SMALLEST) ** rng.random()
    )  # log-uniform: small ones are as usual as large ones
    centre = rng.uniform(half, UNIT - half, 2)
    return _shape(name.split()[1], x - centre[0], y - centre[1], half, rng.uniform(-0.2, 0.2))


def _crowd(rng: Rng, x: Array, y: Array, name: str) -> Array:
    centre = rng.uniform(14, UNIT - 14, 2)
    members = rng.normal(centre, 5.5, (int(rng.integers(8, 13)), 2)).clip(3, UNIT - 3)
    return np.any([_shape(name.split()[1], x - mx, y - my, 2.8, 0.0) for mx, my in members], axis=0)


def _shape(shape: str, dx: Array, dy: Array, half: float, turn: float) -> Array:
    """bool[S, S]: a shape of half-width `half` around 0, 0; squares and triangles are turned, in radians."""
    turn = turn if shape in ("square", "triangle") else 0.0
    u = (dx * np.cos(turn) + dy * np.sin(turn)) / half
    v = (dy * np.cos(turn) - dx * np.sin(turn)) / half
    match shape:
        case "circle":
            return u**2 + v**2 <= 1
        case "square":
            return np.maximum(abs(u), abs(v)) <= 0.88
        case "cross":
            return (np.minimum(abs(u), abs(v)) <= 0.32) & (np.maximum(abs(u), abs(v)) <= 1)
    raise AssertionError(shape)


def _light(thing: _Placed) -> Array:
    """float64[S, S], a factor on the colour: circles are lit like balls, everything else is flat."""
    if thing.name.split()[1] != "circle":
        return np.ones(thing.outline.shape)
    depth = distance_transform_edt(thing.outline)
    return 0.55 + 0.6 * np.sqrt(depth / depth.max())


def _visible_shares(placed: Sequence[_Placed]) -> list[float]:
    return [
        mask.sum() / thing.outline.sum() for thing, mask in zip(placed, _visible_masks(placed), strict=True)
    ]


def _visible_masks(placed: Sequence[_Placed]) -> list[Array]:
    masks = []
    hidden = np.zeros_like(placed[0].outline)
    for thing in reversed(placed):
        masks.append(thing.outline & ~hidden)
        hidden = hidden | thing.outline
    return masks[::-1]


def _visible(placed: Sequence[_Placed], x: Array, y: Array) -> tuple[Thing, ...]:
    things = []
    for thing, mask in zip(placed, _visible_masks(placed), strict=True):
        colour, shape = thing.name.split()
        centre = {"x": float(x[mask].mean() / UNIT), "y": float(y[mask].mean() / UNIT)}
        things.append(Thing(colour=colour, shape=shape, crowd=thing.crowd, mask=mask, **centre))
    return tuple(things)


# ----------------------------------------------------------------------------------------------------- ground


def _regions(rng: Rng, x: Array, y: Array) -> list[tuple[str, Array]]:
    """Distinct kinds of ground in bands, split by horizons that lean, wave or stand upright."""
    number = 1 + int(rng.choice(3, p=NUM_STUFF_SHARES))
    names = [str(name) for name in rng.choice(STUFF, number, replace=False)]
    angle = rng.uniform(-0.35, 0.35) + (np.pi / 2 if rng.random() < 0.25 else 0.0)
    along = (x - UNIT / 2) * np.cos(angle) + (y - UNIT / 2) * np.sin(angle)
    across = (y - UNIT / 2) * np.cos(angle) - (x - UNIT / 2) * np.sin(angle)
    depth = across + rng.uniform(0, 3) * np.sin(along / rng.uniform(4, 9) + rng.uniform(0, 6))
    cuts = (np.arange(1, number) / number - 0.5) * UNIT + rng.uniform(-7, 7, number - 1)
    band = np.searchsorted(cuts, depth.ravel()).reshape(depth.shape)
    return [(name, band == i) for i, name in enumerate(names)]


def _void(rng: Rng, x: Array, y: Array) -> Array:
    """bool[S, S]: a thin strip or a blob that nobody labelled, in some images."""
    if rng.random() >= VOID_SHARE:
        return np.zeros(x.shape, bool)
    cx, cy = rng.uniform(10, UNIT - 10, 2)
    if rng.random() < 0.5:
        angle = rng.uniform(0, np.pi)
        return abs((y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)) < rng.uniform(1.5, 3.0)
    return ((x - cx) / rng.uniform(5, 9)) ** 2 + ((y - cy) / rng.uniform(5, 9)) ** 2 < 1


def _texture(name: str, rng: Rng, x: Array, y: Array) -> Array:
    """float64[S, S, 3]: muted colours, so that no ground is as saturated as a thing."""
    size = len(x)
    match name:
        case "grass":
            return np.array([92, 112, 52]) + _grain(rng, size, 17.0, stretch=4)
        case "water":
            wave = np.sin(y * 1.1 + 1.5 * np.sin(x / 6 + rng.uniform(0, 6)))
            return np.array([92, 150, 178]) + 20 * wave[..., None]
        case "sand":
            return np.array([206, 182, 136]) + _grain(rng, size, 9.0)
        case "sky":
            return np.array([168, 204, 240]) + (y / UNIT * 26 - 6)[..., None]
        case "brick":
            down = y + rng.uniform(0, 12)
            mortar = (down % 6 < 1.2) | ((x + down // 6 % 2 * 6) % 12 < 1.2)
            return np.where(mortar[..., None], np.array([196, 184, 170]), np.array([146, 92, 74]))
        case "snow":
            return np.array([236, 238, 242]) - 60.0 * (_grain(rng, size, 1.0) > 1.7)
        case "wood":
            return (
                np.array([122, 88, 56])
                + 22 * np.sin(x * 0.9 + 2 * np.sin(y / 9 + rng.uniform(0, 6)))[..., None]
            )
        case "tiles":
            check = (x // 8 + y // 8) % 2 == 0
            return np.where(check[..., None], np.array([196, 196, 186]), np.array([132, 140, 140]))
        case "field":
            furrow = (y + rng.uniform(0, 5)) % 5 < 2
            return np.where(furrow[..., None], np.array([150, 152, 70]), np.array([190, 186, 104]))
        case "heath":
            return np.array([150, 104, 140]) + _grain(rng, size, 20.0, stretch=2)
    raise AssertionError(name)


def _grain(rng: Rng, size: int, strength: float, stretch: int = 1) -> Array:
    """float64[S, S, 1]: noise on the grid of 64 units, `stretch` units high."""
    noise = rng.normal(0, strength, (UNIT // stretch, UNIT))
    steps = np.arange(size) * UNIT // size
    return noise[np.ix_(steps // stretch, steps)][..., None]
