"""Words out of the decoder: captions, greedy or by beam search.

The picture's queries are decoded once; of every caption only the newest word passes through the text encoder
and the decoder, and attends to what both have kept of the words before it. Beams of one picture are rows of
one request: they share all that is known of it, and nothing is moved when a beam gives way to another,
because a table says which of the words said so far stand in which beam.

Letters: `R` requests, `n` beams, `M` words said so far over all beams, `T` tokens of a caption, `V` the
vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xdecoder.model.decoder import Pixels
from xdecoder.model.text import TextEncoder
from xdecoder.model.xdecoder import XDecoder
from xdecoder.prompts import END, START, detokenize


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a caption is looked for. Raises `ValueError` where a number makes no sense.

    beams            captions that are followed at a time; 1 is greedy
    length_penalty   a caption scores log-probability / tokens ** length_penalty: 0 is the plain sum, more
                     favours long ones; tokens count the end mark (GNMT, and the usual default of 1)
    min_tokens       no caption ends before it holds so many
    no_repeat        no run of so many tokens stands twice in a caption; 0 allows it
    """

    beams: int = 1
    length_penalty: float = 1.0
    min_tokens: int = 0
    no_repeat: int = 0

    def __post_init__(self) -> None:
        for name, least in (("beams", 1), ("min_tokens", 0), ("no_repeat", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be at least {least}")


GREEDY = Search()


def greedy(model: XDecoder, pixels: Pixels, images: Tensor, task: Tensor, max_tokens: int) -> list[str]:
    """The most likely next token, again and again, until every caption has ended or holds `max_tokens`
    tokens.

    images int64[R] into the batch of `pixels`; task float[R, D] the captioning sentence for each
    """
    return captions(model, pixels, images, task, max_tokens, GREEDY)


@torch.no_grad()
def captions(
    model: XDecoder,
    pixels: Pixels,
    images: Tensor,
    task: Tensor,
    max_tokens: int,
    search: Search,
    region: Tensor | None = None,
) -> list[str]:
    """The best caption that the search finds for each request.

    images int64[R] into the batch of `pixels`; task float[R, D] the captioning sentence for each; region
    bool[R, H, W], True where the words may look (pixels as the model sees them); None is everywhere.
    Raises `ValueError` where max_tokens is not positive.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, it must be at least 1")
    rows, beams = len(images), search.beams
    steps = min(max_tokens, model.config.context - 1)
    writer = _Writer(model, pixels, images, task, beams * steps, region)
    ids = torch.full((rows, beams, 1), START, device=images.device)
    scores = torch.full((rows, beams), -torch.inf, dtype=torch.float64, device=images.device)
    scores[:, 0] = 0  # all beams start alike: one of them counts
    own = torch.eye(beams, dtype=torch.bool, device=images.device).expand(rows, -1, -1)
    lineage = own
    found = [_Found(search, steps) for _ in range(rows)]
    for _ in range(steps):
        logits = writer.add(ids[..., -1], lineage if beams > 1 else None)
        top, parents, words = _candidates(logits, ids, scores, search)
        ended = words == END
        for f, *row in zip(found, top.tolist(), parents.tolist(), ended.tolist(), ids.tolist(), strict=True):
            f.end(*row)
        order = ended.int().argsort(stable=True)[:, :beams]  # those that go on, best first
        scores, parents, words = (x.gather(1, order) for x in (top, parents, words))
        ids = torch.cat((_of_beam(ids, parents), words[..., None]), 2)
        lineage = torch.cat((_of_beam(lineage, parents), own), 2)
        for f, best in zip(found, scores[:, 0].tolist(), strict=True):
            f.settle(best, ids.shape[2])
        if all(f.done for f in found):
            break
    for f, score, row in zip(found, scores.tolist(), ids.tolist(), strict=True):
        f.cut(score, row)
    return [detokenize(f.best) for f in found]


class _Writer:
    """Gives the next word's logits of R growing captions with n beams each."""

    def __init__(
        self, model: XDecoder, pixels: Pixels, images: Tensor, task: Tensor, room: int, region: Tensor | None
    ) -> None:
        assert isinstance(model.text, TextEncoder), "a model that knows no words has no queries for them"
        self.model, self.text, self.place = model, model.text, 0
        self.hearings = model.decoder.listen(pixels, images, task, room, region)
        self.before = self.text.begin(len(images), room)

    def add(self, ids: Tensor, lineage: Tensor | None) -> Tensor:
        """The newest words int64[R, n] -> float[R, n, V]; lineage bool[R, n, M], the words of each beam."""
        blocked = None if lineage is None else ~lineage[:, None]
        tokens = self.text.extend(ids, self.place, self.before, blocked)
        slots = self.model.decoder.extend(tokens, self.place, self.hearings, blocked)
        self.place += 1
        return self.model.caption_logits(slots.flatten(0, 1)).unflatten(0, ids.shape)


class _Found:
    """The finished captions of one request."""

    def __init__(self, search: Search, longest: int) -> None:
        self.search, self.longest, self.done = search, longest, False
        self.captions: list[tuple[float, list[int]]] = []

    @property
    def best(self) -> list[int]:
        """The tokens of the best caption; of equals the first that was found."""
        return max(self.captions, key=lambda pair: pair[0])[1]

    def end(self, scores: list[float], parents: list[int], ended: list[bool], ids: list[list[int]]) -> None:
        """Take those of the best n candidates that have ended."""
        for score, parent, over in list(zip(scores, parents, ended, strict=True))[: self.search.beams]:
            if over and not self.done and score > -torch.inf:
                self.captions.append((self._value(score, len(ids[parent])), ids[parent][1:]))

    def settle(self, score: float, tokens: int) -> None:
        """Done with n captions, or where the best beam, of so many tokens, can no longer beat the best
        one.
        """
        likely = self._value(score, self.longest if self.search.length_penalty > 0 else tokens)
        enough = len(self.captions) >= self.search.beams
        self.done |= enough or any(value >= likely for value, _ in self.captions)

    def cut(self, scores: list[float], ids: list[list[int]]) -> None:
        """Where there was no room to end, captions compete as they are."""
        if not self.done:
            rows = zip(scores, ids, strict=True)
            self.captions += [(self._value(score, len(row) - 1), row[1:]) for score, row in rows]

    def _value(self, score: float, tokens: int) -> float:
        return score / tokens**self.search.length_penalty


def _candidates(logits: Tensor, ids: Tensor, scores: Tensor, search: Search) -> tuple[Tensor, Tensor, Tensor]:
    """The 2n best ways to go on, best first: scores float64, beams they continue, words; [R, 2n] each.

    Of 2n ways at most n end, so that n can be followed. logits float[R, n, V], ids int64[R, n, T].
    """
    width = 2 * search.beams
    total = logits.double().logsumexp(-1, keepdim=True)
    likely, words = _allowed(logits, ids, search).topk(width)  # by logits: sums would blur close ones
    every = (scores[..., None] + likely - total).flatten(1)
    top, place = every.topk(width)
    return top, place // width, words.flatten(1).gather(1, place)


def _allowed(logits: Tensor, ids: Tensor, search: Search) -> Tensor:
    """Logits with minus infinity where a caption would end too early or repeat itself."""
    said, run = ids[..., 1:], search.no_repeat
    logits = logits.clone()
    if said.shape[-1] < search.min_tokens:
        logits[..., END] = -torch.inf
    if run and said.shape[-1] >= run:
        runs = said.unfold(-1, run, 1)
        again = (runs[..., :-1] == said[..., None, said.shape[-1] - run + 1 :]).all(-1)
        row, beam, place = again.nonzero(as_tuple=True)
        logits[row, beam, runs[row, beam, place, -1]] = -torch.inf
    return logits


def _of_beam(table: Tensor, parents: Tensor) -> Tensor:
    """Rows of [R, n, ...] by beam: int64[R, n]."""
    return table.gather(1, parents[..., None].expand(-1, -1, table.shape[2]))
