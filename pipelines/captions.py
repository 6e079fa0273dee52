"""Which captions are refused: text in, the reason out. Settings in, no files.

What no setting allows is text without a letter or digit, and text that was decoded wrongly. The other rules
are those customary for captions from the web (Sharma et al. 2018, "Conceptual Captions", section 3).
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import Literal

import numpy as np

from schemas.jobs import CaptionRules

Asked = Literal[  # what only a setting refuses
    "caption-length",
    "caption-language",
    "caption-boilerplate",
    "caption-address",
    "caption-markup",
    "caption-repeated",
]
Reason = Asked | Literal["caption-invalid"]

_ADDRESS = re.compile(r"https?://|\bwww\.|\b[\w.+-]+@[\w-]+\.\w", re.IGNORECASE)
_MARKUP = re.compile(r"</?[a-z][^<>]*>|&(?:[a-z]{2,8}|#x?[0-9a-f]{1,6});", re.IGNORECASE)


def refusal(caption: str, rules: CaptionRules, repeated: frozenset[int]) -> tuple[Reason, str] | None:
    """Why a caption is refused, and what about it; None where it is kept. `repeated` is of that function."""
    words, letters = caption.split(), [c for c in caption if c.isalpha()]
    if not any(c.isalnum() for c in caption):
        return "caption-invalid", "neither a letter nor a digit"
    if wrong := next((c for c in caption if c == "\ufffd" or _is_control(c)), None):
        return "caption-invalid", f"holds the character U+{ord(wrong):04X}"
    for count, least, most, what in (
        (len(words), rules.min_words, rules.max_words, "words"),
        (len(caption), rules.min_characters, rules.max_characters, "characters"),
    ):
        if count < least or 0 < most < count:
            return "caption-length", f"{count} {what}"
    share = sum(_script(c) in rules.scripts for c in letters) / max(1, len(letters))
    if rules.scripts and letters and share < rules.min_script_share:
        return "caption-language", f"{share:.0%} of its letters are {' or '.join(rules.scripts)}"
    for pattern in rules.boilerplate:
        if re.search(pattern, caption, re.IGNORECASE):
            return "caption-boilerplate", f"matches {pattern!r}"
    if rules.refuse_addresses and (found := _ADDRESS.search(caption)):
        return "caption-address", f"holds {found.group()!r}"
    if rules.refuse_markup and (found := _MARKUP.search(caption)):
        return "caption-markup", f"holds {found.group()!r:.60}"
    if repeated and _hash(caption) in repeated:
        return "caption-repeated", f"stands more than {rules.max_repeats} times in its corpus"
    return None


def repeated(captions: Iterable[str], most: int) -> frozenset[int]:
    """Hashes of captions that stand more often than `most`, however spaced and in whichever case.

    Memory: 8 bytes a caption. All that repeat are refused, the first too, so that their order is nothing.
    """
    hashes, counts = np.unique(np.fromiter(map(_hash, captions), dtype=np.uint64), return_counts=True)
    return frozenset(hashes[counts > most].tolist())


def _hash(caption: str) -> int:
    plain = " ".join(caption.casefold().split())
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest())


@cache
def _script(character: str) -> str:
    """The first word of a letter's Unicode name: latin, cyrillic, cjk, hiragana, arabic, hangul ..."""
    return unicodedata.name(character, "none").partition(" ")[0].lower()


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\t\n\r"
