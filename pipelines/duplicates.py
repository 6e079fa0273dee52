"""Which images are copies: re-encoded, resized, lightly cropped, mirrored? Arrays in, rows out.

An image is known by a thumbnail: 32 x 32 pixels of brightness and 8 x 8 of colour. From it comes a hash of 63
bits, the signs of the lowest cosine coefficients of the inner 80 % of the picture (the idea of the perceptual
hash, Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions"). A lightly cropped
copy shows those inner 80 % elsewhere, so the hashes of an image under every light crop are looked up among
the plain ones; mirroring is an exclusive or. Hashes within 5 bits are found exactly, through three bands of
21 bits of which one differs in one bit at most (pigeonhole; Norouzi et al. 2012, "Fast Search in Hamming
Space with Multi-Index Hashing"). Whatever is found is then verified: the thumbnails are aligned to a fraction
of a pixel and must agree in every part, in brightness and in colour.

Letters: `N` images, `P` pairs, `S` side of the brightness, 32. Decisions depend on the order of the images,
which the caller makes canonical. No files, no time, no chance.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Protocol

import numpy as np

from schemas.masks import Array

SIDE, COLOUR_SIDE = 32, 8
THUMBNAIL_BYTES = SIDE**2 + 2 * COLOUR_SIDE**2
RADIUS = 5  # bits
FLAT = 2.0  # grey levels of standard deviation; below it the hash is one of noise

# Chosen by us, see benchmarks/leakage.py: what is left of a copy after alignment, as a share of its contrast.
MOST_RESIDUAL = 0.3  # over the whole picture
MOST_LOCAL_RESIDUAL = 0.75  # in the worst of 4 x 4 parts: one object put into the same scene
MOST_CROP = 0.08  # of a side, per edge
LEAST_GAIN = 0.75  # a copy keeps its contrast; another picture of one smooth gradient does not
MOST_SHIFT = 12.0  # grey levels between the means
MOST_TINT, MOST_TINT_SHARE = 1.5, 0.2  # of 256 levels of colour, plus a share of how much it varies

_INNER = 0.1  # of a side, not hashed at either end; more than any crop takes away
_STEPS = (0.0, 0.025, 0.05)  # crops that are looked up; those between are within RADIUS of one of them
_BANDS, _BAND_BITS = 3, 21
_CHUNK = 1 << 14  # hashes looked up at a time: 9 MB of probes
_PAIRS = 1 << 20  # candidates compared at a time
_VERIFIED = 256  # thumbnails aligned at a time: 20 MB
_AT_FIRST = 2.0  # how much more colours may differ before pictures are aligned, which costs much more


class Thumbnails(Protocol):
    """Gives uint8[n, 1152] for int64[n] rows: an array, or something that leaves them on disk until then."""

    def __getitem__(self, rows: Array, /) -> Array: ...


def thumbnail(pixels: Array) -> Array:
    """uint8[S, S, 3] of Y, Cb, Cr -> uint8[1152]: the brightness, then both colours 8 x 8."""
    cells = pixels[:, :, 1:].reshape(COLOUR_SIDE, SIDE // COLOUR_SIDE, COLOUR_SIDE, SIDE // COLOUR_SIDE, 2)
    colour = np.rint(cells.mean((1, 3))).astype(np.uint8)
    return np.concatenate([pixels[:, :, 0].ravel(), np.moveaxis(colour, 2, 0).ravel()])


def is_flat(thumbnail: Array) -> bool:
    """Whether uint8[1152] shows too little to tell the image's copies from anything else."""
    return float(_brightness(thumbnail[None]).std()) < FLAT


def hashes(thumbnails: Array) -> Array:
    """uint8[N, 1152] -> uint64[N], equal on every machine: all sums are whole numbers."""
    return _window_hashes(thumbnails, _PLAIN)[:, 0]


def find_copies(hashed: Array, thumbnails: Thumbnails, held_out: Array) -> Array:
    """What each image is a copy of: int64[N], a row, or -1 where it is nobody's.

    hashed       uint64[N], of `hashes`
    held_out     bool[N]; they are never copies

    A copy of held-out images is one of the lowest of them. Any other is a copy of the lowest image that it
    resembles and that is no copy itself. No chains: what only resembles a copy is kept.

    Crops are looked for between held-out images and others; among the others only what shows the whole.
    Memory beside the arguments: 20 bytes an image and about 100 MB, however many are alike.
    """
    copy_of = np.full(len(hashed), -1, dtype=np.int64)
    if not len(hashed):
        return copy_of
    others = np.flatnonzero(~held_out)
    index = HashIndex(hashed[others])
    _leaks(copy_of, index, others, np.flatnonzero(held_out), thumbnails)
    _alike(copy_of, index, others, hashed, thumbnails)
    return copy_of


def _settle(copy_of: Array, one: Array, two: Array, same: Callable[[Array], Array]) -> None:
    """Decide pairs of a row and a later or held-out one; those of all lower rows were decided before.

    same    int64[n], numbers of pairs -> bool[n], whether their images show the same

    A row is compared with the lowest first, and with nothing that is a copy: of N copies of one picture N
    pairs are aligned, not N * N / 2.
    """
    left = np.lexsort((one, two))
    while len(left := left[(copy_of[one[left]] < 0) & (copy_of[two[left]] < 0)]):
        undecided = two[left]
        heads = np.flatnonzero(np.diff(undecided, prepend=-1))
        lowest = one[left[heads]]
        place = np.searchsorted(undecided, lowest).clip(max=len(left) - 1)
        heads = heads[undecided[place] != lowest]  # that will be no copies themselves
        tried = left[heads]
        found = tried[same(tried)]
        copy_of[two[found]] = one[found]
        left = np.delete(left, heads)


def _leaks(
    copy_of: Array, index: "HashIndex", others: Array, held_out: Array, thumbnails: Thumbnails
) -> None:
    """Settle pairs of a held-out image and another that is a copy of it, or the reverse."""
    per_chunk = max(1, _CHUNK // (2 * len(_CROPS)))
    for start in range(0, len(held_out), per_chunk):
        rows = held_out[start : start + per_chunk]
        variants = np.concatenate([_window_hashes(thumbnails[rows], w) for w in _CROP_WAVES], axis=1)
        both = np.stack([variants, variants ^ _MIRROR], axis=1).reshape(len(rows), -1)
        pending = np.zeros((5, 0), dtype=np.int64)
        for query, other, bits in index.within(both.ravel()):
            which, way = np.divmod(query, both.shape[1])
            pairs = np.stack([rows[which], others[other], way // len(_CROPS), bits, way % len(_CROPS)])
            pending = _likest(np.concatenate([pending, pairs[:, copy_of[pairs[1]] < 0]], axis=1))
            whole = pending[0] < rows[which[-1]]  # of the last one there may be more
            _decide(copy_of, thumbnails, pending[:, whole])
            pending = pending[:, ~whole]
        _decide(copy_of, thumbnails, pending)


def _likest(pairs: Array) -> Array:
    """int64[5, P] of one, two, mirrored, bits, crop: of the crops under which two look alike, the likest."""
    one, two, mirrored, bits, crop = pairs
    pairs = pairs[:, np.lexsort((crop, bits, mirrored, two, one))]
    return pairs[:, np.any(np.diff(pairs[:3], axis=1, prepend=-1), axis=0)]


def _alike(copy_of: Array, index: "HashIndex", others: Array, hashed: Array, thumbnails: Thumbnails) -> None:
    """Settle pairs of a lower and a higher row of `others` that show the same, mirrored or not."""
    for start in range(0, len(others), _CHUNK // 2):
        rows = others[start : start + _CHUNK // 2]
        done = np.repeat(copy_of[rows] >= 0, 2)
        both = np.stack([hashed[rows], hashed[rows] ^ _MIRROR], axis=1)
        for query, other, bits in index.within(both.ravel(), done):
            pairs = np.stack([rows[query // 2], others[other], query % 2, bits, np.zeros_like(bits)])
            _decide(copy_of, thumbnails, pairs[:, pairs[0] < pairs[1]])
            done[:] = np.repeat(copy_of[rows] >= 0, 2)


def _decide(copy_of: Array, thumbnails: Thumbnails, pairs: Array) -> None:
    """`_settle` pairs int64[5, P] of `_likest` by what they show."""
    one, two, mirrored, _, crop = pairs
    _settle(
        copy_of,
        one,
        two,
        lambda n: verify(thumbnails, two[n], one[n], mirrored[n].astype(bool), _CROPS[crop[n]]),
    )


# -------------------------------------------------------------------------------------------------- search


class HashIndex:
    """Hashes in three orders, one a band of bits; 12 bytes a hash and 24 MB beside the hashes."""

    def __init__(self, hashed: Array) -> None:
        """uint64[N]."""
        self._hashes = np.ascontiguousarray(hashed, dtype=np.uint64)
        self._order = np.empty((_BANDS, len(hashed)), dtype=np.int32)
        self._starts = np.zeros((_BANDS, _ENDS), dtype=np.int32)
        for band in range(_BANDS):
            keys = _band(self._hashes, band)
            self._order[band] = np.argsort(keys, kind="stable")
            np.cumsum(np.bincount(keys, minlength=_ENDS - 1), out=self._starts[band, 1:])
            self._starts[band] += band * len(hashed)

    def within(self, queries: Array, done: Array | None = None) -> Iterator[tuple[Array, Array, Array]]:
        """uint64[M] -> (query, row, bits): every pair that differs in at most `RADIUS` bits, once.

        In pieces, by query. The caller may set what is `done`, bool[M], meanwhile: such queries are passed
        over from the next piece on. Exact: where 5 bits are spread over 3 bands, one band has at most one.
        """
        done = np.zeros(len(queries), dtype=bool) if done is None else done
        for start in range(0, len(queries), _CHUNK):
            part = queries[start : start + _CHUNK]
            keys = np.stack([_band(part, band) for band in range(_BANDS)], axis=1)
            probes = ((keys[:, :, None] ^ _FLIPS) + np.arange(_BANDS)[:, None] * _ENDS).ravel()
            ranges = self._starts.ravel()[probes], self._starts.ravel()[probes + 1]
            for probe, place in _ranges(*ranges, done[start : start + _CHUNK]):
                query, band = probe // _PROBES, probe % _PROBES // len(_FLIPS)
                row = self._order.ravel()[place]
                differ = part[query] ^ self._hashes[row]
                bits = np.bitwise_count(differ)
                near = np.flatnonzero(bits <= RADIUS)
                for earlier in range(_BANDS - 1):  # it was found there already
                    known = np.bitwise_count(_band(differ[near], earlier)) <= 1
                    near = near[~(known & (band[near] > earlier))]
                if len(near):
                    yield query[near] + start, row[near].astype(np.int64), bits[near].astype(np.int64)


def _ranges(starts: Array, ends: Array, done: Array) -> Iterator[tuple[Array, Array]]:
    """Every place of every range beside the number of its range, about `_PAIRS` places at a time.

    done    of every `_PROBES` ranges, whether their places are not wanted any more
    """
    filled = np.flatnonzero(ends > starts)
    starts, sizes = starts[filled].astype(np.int64), (ends - starts)[filled].astype(np.int64)
    totals = np.concatenate([[0], np.cumsum(sizes)])
    shifts = starts - totals[:-1]
    low = 0
    while low < totals[-1]:
        at = int(np.searchsorted(totals, low, side="right")) - 1
        wanted = ~done[filled[at:] // _PROBES]
        if not wanted.any():
            return
        low = max(low, int(totals[at + wanted.argmax()]))
        high = min(low + _PAIRS, int(totals[-1]))
        last = int(np.searchsorted(totals, high))
        which = np.repeat(np.arange(at, last), np.diff(totals[at : last + 1].clip(low, high)))
        yield filled[which], shifts[which] + np.arange(low, high)
        low = high


def _band(hashed: Array, band: int) -> Array:
    return (hashed >> np.uint64(band * _BAND_BITS) & np.uint64((1 << _BAND_BITS) - 1)).astype(np.int64)


_FLIPS = np.array([0, *(1 << bit for bit in range(_BAND_BITS))])
_PROBES = _BANDS * len(_FLIPS)  # ranges a query
_ENDS = (1 << _BAND_BITS) + 1  # of the values of a band, where each begins and the last one ends


# ------------------------------------------------------------------------------------------------ the hash


def _crops() -> tuple[Array, tuple[Array, Array]]:
    """Where one image lies in another: float64[C, 4] maps (scale, shift of x; of y), and the waves of both.

    The first half are crops of the held-out image, the second half are images that it is a crop of. A map
    takes x in [0, 1] of the other image to x of the held-out one.
    """
    inside = np.array([(1 - low - high, low) for low, high in product(_STEPS, _STEPS)])
    outside = np.stack([1 / inside[:, 0], -inside[:, 1] / inside[:, 0]], axis=1)
    maps = np.array([[*x, *y] for ways in (inside, outside) for y, x in product(ways, ways)])
    inner, whole = (
        _waves(np.stack([ways[:, 1] + ways[:, 0] * _INNER, ways[:, 1] + ways[:, 0] * (1 - _INNER)], axis=1))
        for ways in (inside, outside)
    )
    return maps, (inner, whole)


def _bit_order() -> tuple[Array, np.uint64]:
    """Which of the 8 x 8 coefficients each bit is, and the bits that mirroring turns.

    Low frequencies first, dealt to the bands in turn, so that all bands tell images apart equally well.
    """
    coefficients = sorted(product(range(8), range(8)), key=lambda yx: (sum(yx), yx))[1:]
    dealt = [yx for band in range(_BANDS) for yx in coefficients[band::_BANDS]]
    mirrored = sum(1 << bit for bit, (_, x) in enumerate(dealt) if x % 2)
    return np.array([8 * y + x for y, x in dealt]), np.uint64(mirrored)


def _window_hashes(thumbnails: Array, waves: Array) -> Array:
    """uint8[N, 1152] -> uint64[N, n * n]: of every window of rows and of columns; waves are of `_waves`."""
    sums = waves @ _brightness(thumbnails) @ waves.T
    num_windows = len(waves) // 8
    blocks = sums.reshape(len(thumbnails), num_windows, 8, num_windows, 8).swapaxes(2, 3)
    signs = blocks.reshape(*blocks.shape[:3], 64)[..., _ORDER] > 0
    padded = np.concatenate([signs, np.zeros_like(signs[..., :1])], axis=-1)
    packed = np.ascontiguousarray(np.packbits(padded, axis=-1, bitorder="little")).view("<u8")
    return packed.reshape(len(thumbnails), num_windows**2).astype(np.uint64)


def _waves(windows: Array) -> Array:
    """float64[n * 8, S]: cosines over each window, integrated over pixels, rounded to whole 1/65536."""
    edges = (np.arange(SIDE + 1) / SIDE).clip(windows[:, :1], windows[:, 1:])
    place = (edges - windows[:, :1]) / (windows[:, 1:] - windows[:, :1])
    waves = np.pi * np.arange(1, 8)[:, None]
    cosines = np.sin(waves * place[:, None]) / waves
    whole = np.concatenate([place[:, None], cosines], axis=1)
    return np.rint(np.diff(whole) * 65536).reshape(len(windows) * 8, SIDE)


_CROPS, _CROP_WAVES = _crops()
_PLAIN = _CROP_WAVES[0][:8]
_ORDER, _MIRROR = _bit_order()


# -------------------------------------------------------------------------------------------- verification


def verify(thumbnails: Thumbnails, one: Array, two: Array, mirrored: Array, maps: Array) -> Array:
    """bool[P]: whether the images of rows `one` and `two` (int64[P]) show the same.

    mirrored   bool[P], whether the second is to be mirrored
    maps       float64[P, 4], about where the first lies in the second, before mirroring
    """
    same = np.zeros(len(one), dtype=bool)
    for start in range(0, len(one), _VERIFIED):
        part = slice(start, start + _VERIFIED)
        flip, place = mirrored[part], maps[part].copy()
        place[flip, 1] = 1 - place[flip, 1] - place[flip, 0]
        first, second = thumbnails[one[part]], thumbnails[two[part]]
        near = _same_colours(_colour(first), _mirrored(_colour(second), flip), place, tolerance=_AT_FIRST)
        if near.any():
            same[part][near] = _aligned(first[near], second[near], flip[near], place[near])
    return same


def _aligned(first: Array, second: Array, flip: Array, place: Array) -> Array:
    """Whether thumbnails uint8[P, 1152] show the same where they lie over each other best, near `place`."""
    grey = _smooth(_brightness(first)), _mirrored(_smooth(_brightness(second)), flip)
    for _ in range(4):
        place = place + _correction(*grey, place)
    colour = _colour(first), _mirrored(_colour(second), flip)
    return np.asarray(_is_light_crop(place) & _same_shapes(*grey, place) & _same_colours(*colour, place))


def _is_light_crop(place: Array) -> Array:
    scale, low = place[:, [0, 2]], place[:, [1, 3]]
    return np.asarray(np.abs(np.concatenate([low, 1 - low - scale], axis=1)).max(1) <= MOST_CROP)


def _same_shapes(first: Array, second: Array, place: Array) -> Array:
    """Whether what one contrast and brightness do not explain is little, everywhere."""
    seen, valid = _warped(second, place)
    gain, shift = _fitted(np.stack([seen, np.ones_like(seen)], axis=1), first, valid).T
    size = valid.sum((1, 2)).clip(1)
    mean = (first * valid).sum((1, 2)) / size
    contrast = np.sqrt(((first - mean[:, None, None]) ** 2 * valid).sum((1, 2)) / size).clip(1e-6)
    wrong = (first - gain[:, None, None] * seen - shift[:, None, None]) ** 2 * valid
    part_size, part_wrong = _by_part(valid), _by_part(wrong)
    counted = part_size >= (SIDE // _PARTS) ** 2 / 4
    return np.asarray(
        (np.sqrt(wrong.sum((1, 2)) / size) <= MOST_RESIDUAL * contrast)
        & (np.sqrt((part_wrong / part_size.clip(1) * counted).max(1)) <= MOST_LOCAL_RESIDUAL * contrast)
        & (gain >= LEAST_GAIN)
        & (gain <= 1 / LEAST_GAIN)
        & (np.abs(((first - seen) * valid).sum((1, 2)) / size) <= MOST_SHIFT)
    )


def _same_colours(first: Array, second: Array, place: Array, tolerance: float = 1.0) -> Array:
    """Whether the colours agree; a copy may have lost them. float64[P, 2, 8, 8], 0 is grey."""
    seen, _ = _warped(second, place)
    wrong = _by_part(first - seen) / (COLOUR_SIDE // _PARTS) ** 2
    tint = np.sqrt((wrong**2).mean((1, 2)))
    spread = np.sqrt(first.var((2, 3)).mean(1))
    grey = np.minimum(*(np.abs(colour).max((1, 2, 3)) for colour in (first, second))) <= 2
    return np.asarray(grey | (tint <= tolerance * (MOST_TINT + MOST_TINT_SHARE * spread)))


def _correction(first: Array, second: Array, place: Array) -> Array:
    """One Gauss-Newton step of the map (Lucas and Kanade 1981), with brightness and contrast set free."""
    seen, valid = _warped(second, place)
    down, _ = _warped(np.gradient(second, 1 / SIDE, axis=1), place)
    across, _ = _warped(np.gradient(second, 1 / SIDE, axis=2), place)
    centres = _centres(SIDE)
    terms = [seen, np.ones_like(seen), across * centres, across, down * centres[:, None], down]
    fitted = _fitted(np.stack(terms, axis=1), first, valid)
    gain = np.where(np.abs(fitted[:, :1]) < 1e-3, 1e-3, fitted[:, :1])
    return np.asarray((fitted[:, 2:] / gain).clip(-0.03, 0.03))


def _fitted(terms: Array, target: Array, valid: Array) -> Array:
    """float64[P, K, S, S], [P, S, S], bool[P, S, S] -> [P, K], least squares over what both images show."""
    flat = (terms * valid[:, None]).reshape(*terms.shape[:2], -1)
    normal = flat @ flat.swapaxes(1, 2)
    ridge = 1e-6 * np.trace(normal, axis1=1, axis2=2)[:, None, None] + 1e-6
    right = flat @ target.reshape(len(target), -1, 1)
    return np.asarray(np.linalg.solve(normal + ridge * np.eye(terms.shape[1]), right)[..., 0])


def _warped(image: Array, place: Array) -> tuple[Array, Array]:
    """What the second image [P, ..., side, side] shows at the first one's pixels, and where it shows any."""
    side = image.shape[-1]
    x = place[:, 0:1] * _centres(side) + place[:, 1:2]
    y = place[:, 2:3] * _centres(side) + place[:, 3:4]
    inside = ((y >= 0) & (y <= 1))[:, :, None] & ((x >= 0) & (x <= 1))[:, None, :]
    down, across = _cubic(y), _cubic(x).swapaxes(1, 2)
    if image.ndim == 4:
        down, across = down[:, None], across[:, None]
    return down @ image @ across, inside


def _cubic(place: Array) -> Array:
    """float64[P, n] in [0, 1] -> weights float64[P, n, n] of Keys' cubic convolution (1981), a = -1/2."""
    side = place.shape[1]
    far = np.abs((place * side - 0.5).clip(0, side - 1)[:, :, None] - np.arange(side))
    near = (1.5 * far - 2.5) * far**2 + 1
    outer = ((-0.5 * far + 2.5) * far - 4) * far + 2
    weights = np.where(far <= 1, near, np.where(far < 2, outer, 0.0))
    return np.asarray(weights / weights.sum(2, keepdims=True))


def _centres(side: int) -> Array:
    return (np.arange(side) + 0.5) / side


def _brightness(thumbnails: Array) -> Array:
    return thumbnails[:, : SIDE**2].reshape(-1, SIDE, SIDE).astype(np.float64)


def _colour(thumbnails: Array) -> Array:
    return thumbnails[:, SIDE**2 :].reshape(-1, 2, COLOUR_SIDE, COLOUR_SIDE).astype(np.float64) - 128


def _mirrored(images: Array, which: Array) -> Array:
    images[which] = images[which][..., ::-1]
    return images


def _smooth(images: Array) -> Array:
    """float64[P, S, S], less what sampling made of details finer than two pixels."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)), "edge")
    rows = sum(w * padded[:, i : i + SIDE] for i, w in enumerate(_BINOMIAL))
    return np.asarray(sum(w * rows[:, :, i : i + SIDE] for i, w in enumerate(_BINOMIAL)))


def _by_part(pixels: Array) -> Array:
    """[..., side, side] -> sums over 4 x 4 parts, [..., 16]."""
    step = pixels.shape[-1] // _PARTS
    cells = pixels.reshape(*pixels.shape[:-2], _PARTS, step, _PARTS, step)
    return cells.sum((-3, -1)).reshape(*pixels.shape[:-2], _PARTS**2)


_PARTS = 4
_BINOMIAL = np.array([1, 4, 6, 4, 1]) / 16
