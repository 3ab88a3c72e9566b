"""Full text in any language: what a word is, and which text fits best. The databases have no say in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.search import query_words, ranked, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Straße, ÉCOLE; order-1042!", ["strasse", "ecole", "order", "1042"]),
        ("İstanbul ﬁne Ｆｕｌｌ", ["istanbul", "fine", "full"]),  # noqa: RUF001  # the wide letters are the point
        ("हिन्दी 한국어 שלום", ["हिन्दी", "한국어", "שלום"]),
        ("猫が好き", ["猫", "が", "好", "き", "猫が", "が好", "好き"]),
        ("🚚 🚚x", ["🚚", "🚚", "x"]),
        ("\"'\\ -- * () : ^ + \x00 \ud800", []),
        ("", []),
    ],
)
def test_words_are_what_people_look_for(text: str, expected: list[str]) -> None:
    """Without case and accents; scripts without spaces by neighbours; nothing that means something to a database."""
    assert list(words(text)) == expected


@given(st.text())
def test_a_word_is_found_by_itself(text: str) -> None:
    """Whatever is written: looked for as it was written, a text is found, if there is a word in it."""
    found = list(words(text))
    assert all(not set(word) & set(" \"'\\*:&|!()") for word in found)
    assert bool(query_words(text)) == bool(found)
    assert ranked(query_words(text), [text]) == ([0] if found else [])


@given(st.text(st.characters(max_codepoint=127)))
def test_plain_english_has_no_words_of_its_own(text: str) -> None:
    """ASCII is read faster, and in the same way as beside other letters."""
    assert [*words(text), "e"] == list(words(f"{text} é"))


def test_very_long_queries_are_cut() -> None:
    """A megabyte that arrives is no megabyte for the database."""
    assert len(query_words(" ".join(f"w{number}" for number in range(100_000)))) == 64
    assert query_words("x" * 1_000_000) == ["x" * 64]


@pytest.mark.parametrize(
    ("query", "best"),
    [
        ("Is the parcel with the neighbour?", "Parcels are left with the neighbour."),  # most words
        ("the dog", "Has a dog."),  # a rare word beats a common one
        ("refunded", "Was promised a refund."),  # other forms: without an ending,
        ("refund", "Was promised a refund."),
        ("promise", "Was promised a refund."),  # and with one
        ("ÉTÉ", "En été, livrer le matin."),
        ("宅配", "宅配ボックスに入れてください。"),
        ("🐶", "🐶 in the yard"),
    ],
)
def test_the_best_fit_comes_first(query: str, best: str) -> None:
    """More words, rarer words, the word itself rather than a relative."""
    texts = [
        "The customer likes the colour of the tent.",
        "The parcel is the heavy one.",
        "Parcels are left with the neighbour.",
        "The address is the office.",
        "Has a dog.",
        "Was promised a refund.",
        "En été, livrer le matin.",
        "宅配ボックスに入れてください。",
        "🐶 in the yard",
    ]
    assert texts[ranked(query_words(query), texts)[0]] == best


def test_what_holds_no_word_does_not_fit_and_of_equals_the_first_wins() -> None:
    """Numbers have no other forms: order 104 is not order 1042."""
    texts = ["order 1042 is late", "order 104 is late", "nothing", "order 104 is late"]
    assert ranked(["104"], texts) == [1, 3]
    assert ranked(["absent"], texts) == []
    assert ranked(["104"], []) == []
