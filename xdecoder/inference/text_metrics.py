"""Scores of what is said: retrieval, captions and answers. The contract of a metric stands in `metrics`.

Letters: N images, T texts.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from schemas.masks import Array
from schemas.records import Question
from xdecoder.inference.metrics import Rows, Scores, percent
from xdecoder.inference.wording import ClassNames, normalise_answer, words

RANKS = (1, 5, 10)


class RetrievalRecall:
    """Recall at 1, 5 and 10, both ways, in one gallery. Example: a text.

    Ties count against the model (a constant similarity scores 0 in any gallery of more than k). Rows
    float64[2, 4], hits at 1, 5, 10 and queries: of the texts of an image (text to image), and of the image
    (image to text). A weighting of the images weighs queries; the gallery stays whole.
    """

    def __init__(self) -> None:
        self._rows = Rows(2, 4)

    @property
    def examples(self) -> int:
        return round(self._rows.total()[0, 3])

    def update(self, similarity: Array, owner: Array) -> None:
        """similarity float[N, T], owner int[T]: the image of each text. The whole gallery at once.

        Raises `ValueError` where the similarity is not finite or a text belongs to no image.
        """
        if not np.isfinite(similarity).all():
            raise ValueError("the similarity of some image and text is not finite: no ranking is possible")
        if owner.shape != similarity.shape[1:] or not np.isin(owner, np.arange(len(similarity))).all():
            raise ValueError(
                f"owner must name an image in [0, {len(similarity)}) for each text, got {owner!r:.200}"
            )
        own = similarity[owner, np.arange(len(owner))]
        text_rank = (similarity >= own).sum(0) - 1
        for image, scores in enumerate(similarity):
            mine = owner == image
            row = np.zeros((2, 4))
            row[0] = [*((text_rank[mine] < k).sum() for k in RANKS), mine.sum()]
            if mine.any():
                rank = (scores[~mine] >= scores[mine].max()).sum()
                row[1] = [*(rank < k for k in RANKS), 1]
            self._rows.append(row)

    def export(self) -> dict[str, Array]:
        return {"rows": self._rows.array}

    def load(self, arrays: Mapping[str, Array]) -> None:
        self._rows.extend(arrays["rows"])

    def compute(self, weights: Array | None = None) -> Scores:
        """{text_to_image_R1, _R5, _R10, image_to_text_R1, _R5, _R10}."""
        ways = zip(("text_to_image", "image_to_text"), self._rows.total(weights), strict=True)
        return {f"{way}_R{k}": percent(hits[i], hits[3]) for way, hits in ways for i, k in enumerate(RANKS)}


class CaptionScores:
    """F1 over the classes that a caption names, and corpus BLEU-4. Example: an image.

    F1 compares the set of classes named in the caption with the set named in any of the references
    (`wording.ClassNames`) and is averaged over images. BLEU-4 is that of the COCO caption toolkit (closest
    reference length, no smoothing), but with our tokeniser instead of the Java one. Rows float64[12]: F1, 1,
    n-gram hits (4), n-grams (4), lengths (2).
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = ClassNames(names)
        self._rows = Rows(12)

    @property
    def examples(self) -> int:
        return len(self._rows)

    def update(self, candidate: str, references: Sequence[str]) -> None:
        """Raises `ValueError` where there are no references."""
        if not references:
            raise ValueError(f"caption {candidate!r} has no references to be compared with")
        named = frozenset().union(*(self.names.named(r) for r in references))
        row = bleu_row(words(candidate), References.of(references))
        self._rows.append(np.concatenate([[set_f1(self.names.named(candidate), named), 1], row]))

    def export(self) -> dict[str, Array]:
        return {"rows": self._rows.array}

    def load(self, arrays: Mapping[str, Array]) -> None:
        self._rows.extend(arrays["rows"])

    def compute(self, weights: Array | None = None) -> Scores:
        """{F1, BLEU4}."""
        total = self._rows.total(weights)
        return {"F1": percent(total[0], total[1]), "BLEU4": bleu(total[2:]) if total[1] else math.nan}


class VqaAccuracy:
    """VQA v2 accuracy, overall and by kind of question. Example: a question.

    Rows float64[kinds, 2]: sum of accuracies, questions.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = tuple(sorted(set(kinds)))
        self._rows = Rows(len(self.kinds), 2)

    @property
    def examples(self) -> int:
        return round(self._rows.total()[:, 1].sum())

    def update(self, answers: Sequence[str], questions: Sequence[Question]) -> None:
        """All questions of one image with the model's answers. Raises `ValueError` for an unknown kind."""
        row = np.zeros((len(self.kinds), 2))
        for answer, question in zip(answers, questions, strict=True):
            if question.kind not in self.kinds:
                raise ValueError(f"question kind {question.kind!r} is none of {self.kinds}")
            row[self.kinds.index(question.kind)] += vqa_accuracy(answer, question.answers), 1
        self._rows.append(row)

    def export(self) -> dict[str, Array]:
        return {"rows": self._rows.array}

    def load(self, arrays: Mapping[str, Array]) -> None:
        self._rows.extend(arrays["rows"])

    def compute(self, weights: Array | None = None) -> Scores:
        """{accuracy, accuracy/KIND ...}."""
        total = self._rows.total(weights)
        by_kind = {f"accuracy/{kind}": percent(*row) for kind, row in zip(self.kinds, total, strict=True)}
        return {"accuracy": percent(*total.sum(0)), **by_kind}


def set_f1(guess: frozenset[str], true: frozenset[str]) -> float:
    """F1 of two sets in [0, 1]; two empty sets agree."""
    return 2 * len(guess & true) / (len(guess) + len(true)) if guess or true else 1.0


@dataclass(frozen=True, kw_only=True)
class References:
    """The references of one image as BLEU needs them: the most of each n-gram in any one, and the lengths."""

    most: Counter[tuple[str, ...]]
    lengths: tuple[int, ...]

    @staticmethod
    def of(texts: Sequence[str]) -> "References":
        tokens = [words(text) for text in texts]
        most: Counter[tuple[str, ...]] = Counter()
        for counts in map(ngrams, tokens):
            most |= counts
        return References(most=most, lengths=tuple(map(len, tokens)))


def bleu_row(candidate: Sequence[str], references: References) -> Array:
    """float64[10] of one caption: clipped n-gram hits for n = 1..4, n-grams, length, closest reference length
    (the shorter of two equally close).
    """
    row = np.zeros(10)
    for gram, count in ngrams(candidate).items():
        row[len(gram) - 1] += min(count, references.most[gram])
        row[len(gram) + 3] += count
    length = len(candidate)
    row[8:] = length, min((abs(n - length), n) for n in references.lengths)[1]
    return row


def ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    """How often each run of 1 to 4 words occurs."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, 5) for i in range(len(tokens) - n + 1))


def bleu(total: Array) -> float:
    """Corpus BLEU-4 in percent from summed `bleu_row`s; 0 where some n has no hit."""
    hits, grams, (length, reference) = total[:4], total[4:8], total[8:]
    if not hits.all():
        return 0.0
    brevity = min(0.0, 1 - reference / length)
    return 100 * math.exp(brevity + float(np.log(hits / grams).mean()))


def vqa_accuracy(answer: str, truth: Sequence[str]) -> float:
    """Mean over the people, each left out once, of min(1, others with this answer / 3) (VQA v2).

    Both sides are normalised. Where fewer than four people answered, all the others suffice; one alone must
    agree.
    """
    agree = [normalise_answer(a) == normalise_answer(answer) for a in truth]
    if len(agree) < 2:
        return float(any(agree))
    needed = min(3, len(agree) - 1)
    return sum(min(1.0, (sum(agree) - mine) / needed) for mine in agree) / len(agree)
