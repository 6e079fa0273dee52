"""Every rule of captions and licences refuses what it says, names it, and leaves the rest alone."""

import pytest
from pydantic import ValidationError

from pipelines.captions import refusal, repeated
from pipelines.corpora.rows import Row
from pipelines.screening import CHOSEN, screen, unlicensed
from schemas.jobs import CaptionRules, CurateConfig, LicenceRules
from schemas.records import Question, Reject, Source


def row(*captions: str, licence: str = "", ids: tuple[str, ...] = (), **fields: object) -> Row:
    base: dict[str, object] = {
        "corpus": "c",
        "split": "train",
        "image_id": "1",
        "image_path": "1",
        "height": 2,
        "width": 2,
        "captions": captions,
        "source": Source(corpus="c", files=("1",), ids=ids, licence=licence),
    }
    return Row(**(base | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rules", "caption", "reason", "detail"),
    [
        ({}, "?!", "caption-invalid", "neither"),
        ({}, "a caf\ufffd", "caption-invalid", "U+FFFD"),
        ({}, "a\x00b", "caption-invalid", "U+0000"),
        ({"min_words": 3}, "two words", "caption-length", "2 words"),
        ({"max_words": 1}, "two words", "caption-length", "2 words"),
        ({"min_characters": 10}, "two words", "caption-length", "9 characters"),
        ({"max_characters": 8}, "two words", "caption-length", "9 characters"),
        ({"scripts": ("latin",)}, "кот на диване", "caption-language", "0% of its letters are latin"),
        ({"scripts": ("cjk", "hiragana")}, "a dog", "caption-language", "cjk or hiragana"),
        ({"boilerplate": ("^stock (photo|image)",)}, "Stock photo of a cat", "caption-boilerplate", "stock"),
        ({"refuse_addresses": True}, "see https://x.org", "caption-address", "https://"),
        ({"refuse_addresses": True}, "mail me@x.org", "caption-address", "me@x"),
        ({"refuse_markup": True}, "a <b>cat</b>", "caption-markup", "<b>"),
        ({"refuse_markup": True}, "cats &amp; dogs", "caption-markup", "&amp;"),
    ],
)
def test_a_rule_refuses_what_it_says_and_only_where_it_is_set(
    rules: dict[str, object], caption: str, reason: str, detail: str
) -> None:
    found = refusal(caption, CaptionRules.model_validate(rules), frozenset())
    assert found is not None and found[0] == reason and detail in found[1]
    assert reason == "caption-invalid" or refusal(caption, CaptionRules(), frozenset()) is None


@pytest.mark.parametrize("caption", ["a 3 < 4 sign", "R&D at work", "café, 2 €", "新しい犬", "I ❤ NY"])
def test_honest_captions_pass_rules_against_markup_and_addresses(caption: str) -> None:
    rules = CaptionRules(refuse_markup=True, refuse_addresses=True, scripts=("latin", "cjk", "hiragana"))
    assert refusal(caption, rules, frozenset()) is None


def test_captions_that_repeat_are_refused_in_all_places() -> None:
    often = repeated(["Image  unavailable", "image unavailable", "a cat", "IMAGE UNAVAILABLE"], 2)
    rules = CaptionRules(max_repeats=2)
    found = refusal("image unavailable", rules, often)
    assert found is not None and found[0] == "caption-repeated"
    assert refusal("a cat", rules, often) is None
    assert not repeated(["a", "a"], 2)


def screened(item: Row, **rules: object) -> tuple[list[Row], list[Reject]]:
    config = CurateConfig.model_validate({"captions": rules})
    found = list(screen([item], config, frozenset()))
    return [i for i in found if isinstance(i, Row)], [i for i in found if isinstance(i, Reject)]


def test_a_row_keeps_its_other_annotations_and_goes_with_its_last_one() -> None:
    (kept,), (gone,) = screened(row("a cat", "a very long caption", ids=("5", "6")), max_words=2)
    assert kept.captions == ("a cat",) and kept.source.ids == ("5",)
    assert gone.reason == "caption-length" and "a very long caption" in gone.detail
    assert screened(row("one two three"), max_words=2)[0] == []
    asked = Question(question="?", answers=("yes",), kind="")
    (kept,), _ = screened(row("one two three", questions=(asked,)), max_words=2)
    assert kept.captions == () and kept.questions == (asked,)


def test_an_evaluation_split_stays_whole() -> None:
    item = row("one two three", "?", split="val")
    (kept,), (gone,) = screened(item, max_words=2)
    assert kept.captions == ("one two three",) and gone.reason == "caption-invalid"


def test_without_settings_a_row_is_the_same_row() -> None:
    item = row("See https://x.org, <b>now</b>")
    assert screened(item) == ([item], [])


NC = "Attribution-NonCommercial License http://creativecommons.org/licenses/by-nc/2.0/"


@pytest.mark.parametrize(
    ("licence", "rules", "refused"),
    [
        ("CC BY 4.0", {}, ""),
        ("", {}, ""),
        ("", {"unknown": "reject"}, "no licence"),
        ("CC BY-NC 2.0", {"deny": ("*-nc*",)}, "denied"),
        ("CC BY 4.0", {"deny": ("*-nc*",)}, ""),
        ("CC0", {"allow": ("cc by*", "cc0")}, ""),
        ("All rights reserved", {"allow": ("cc by*", "cc0")}, "not among"),
        ("CC BY-NC 2.0", {"allow": ("cc by*",), "deny": ("*nc*",)}, "denied"),
        (NC, {"deny": ("*/by-nc*",)}, "denied"),
        (NC, {"allow": ("attribution*license",)}, ""),
        (NC, {"allow": ("attribution license", "*/licenses/by/*")}, "not among"),
        (NC.split(" ")[-1], {"deny": ("*/by-nc*",)}, "denied"),
    ],
)
def test_licences_are_kept_by_pattern(licence: str, rules: dict[str, object], refused: str) -> None:
    why = unlicensed(row("a", licence=licence), LicenceRules.model_validate(rules))
    assert refused in why and bool(why) == bool(refused)


def test_what_is_refused_for_no_fault_of_its_own_is_no_sign_of_a_broken_corpus() -> None:
    assert "caption-invalid" not in CHOSEN and "leakage" in CHOSEN
    config = CurateConfig(licences=LicenceRules(deny=("*",)))
    (gone,) = screen([row("a", licence="X")], config, frozenset())
    assert isinstance(gone, Reject) and gone.reason in CHOSEN


def test_settings_that_no_caption_passes_are_refused() -> None:
    with pytest.raises(ValidationError, match="no caption would pass"):
        CaptionRules(min_words=5, max_words=4)
    with pytest.raises(ValidationError, match="no regular expression"):
        CaptionRules(boilerplate=("(",))
