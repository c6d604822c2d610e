"""Filters, by numbers counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precompute.config import FiltersConfig
from precompute.run.filters import other_letters, repetition, script_of, why_filtered


def why(text: str, *, n_tokens: int = 10, opens_think: bool = False, **filters: Any) -> str | None:
    settings = FiltersConfig.model_validate(filters)
    return why_filtered(settings, text=text, n_tokens=n_tokens, form="boxed", opens_think=opens_think)


@given(st.text(), st.integers(1, 10**6))
def test_nothing_is_filtered_unless_it_is_asked_for(text: str, n_tokens: int) -> None:
    assert why(text, n_tokens=n_tokens) is None


def test_lengths_are_inclusive_and_in_the_teachers_tokens() -> None:
    assert why("x", n_tokens=5, min_tokens=5, max_tokens=5) is None
    assert why("x", n_tokens=4, min_tokens=5) == "min_tokens: 4 tokens, fewer than 5"
    assert why("x", n_tokens=6, max_tokens=5) == "max_tokens: 6 tokens, more than 5"
    # 0: nobody counted them, as in traces that were made elsewhere.
    assert why("x", n_tokens=0, min_tokens=5) is None


def test_repetition_is_the_share_of_ngrams_that_occur_earlier() -> None:
    # Pieces a b a b a b: the 2-grams ab ba ab ba ab are 5, of which 3 are repeated.
    assert repetition("a b a b a b", 2) == pytest.approx(3 / 5)
    # 2 + 2 = 4 . twice is 12 pieces: 11 2-grams, of which 5 are repeated (.2 is not).
    assert repetition("2+2=4. 2+2=4.", 2) == pytest.approx(5 / 11)
    assert repetition("a b c d e f", 2) == 0.0
    # Five pieces hold no 6-gram.
    assert repetition("a a a a a", 6) == 0.0
    said = why("a b a b a b", max_repetition=0.5, repetition_ngram=2)
    assert said == "max_repetition: 0.600 of its 2-grams are repeated, more than 0.5"
    assert why("a b a b a b", max_repetition=0.6, repetition_ngram=2) is None


def test_a_loop_is_caught_and_ordinary_reasoning_is_not() -> None:
    step = "Adding {0} to both sides of the equation gives {1}, so that the left side becomes {2}. "
    reasoning = "".join(step.format(n, n * n + 3, n + 17) for n in range(40))
    assert why(reasoning, max_repetition=0.3) is None
    looping = reasoning + "Wait, let me check that again from the very beginning of the problem. " * 200
    # 40 x 19 and 200 x 15 pieces, 3741 20-grams; of the 2981 in the loop alone 15 are new: 2966 / 3741.
    assert str(why(looping, max_repetition=0.3)).startswith("max_repetition: 0.793 of its 20-grams")


def test_scripts_are_told_by_letters_alone() -> None:
    # Of 8 letters 2 are Chinese; digits, symbols and spaces do not count.
    text = "answer 12 + 3: 答案"
    assert other_letters(text, ["latin"]) == pytest.approx(2 / 8)
    assert other_letters(text, ["latin", "cjk"]) == 0.0
    assert other_letters("12 + 3 = 15", ["latin"]) == 0.0
    said = why(text, scripts=["latin"])
    assert said == "scripts: 0.250 of its letters are not latin, more than 0.05"
    assert why(text, scripts=["latin"], max_other_letters=0.25) is None
    assert why("Где же x?", scripts=["latin", "greek"]) is not None


def test_mathematical_letters_are_the_letters_they_stand_for() -> None:
    assert [script_of(letter) for letter in "aé𝐱ℝπ𝛼ж中ひ"] == [
        "latin", "latin", "latin", "latin", "greek", "greek", "cyrillic", "cjk", "hiragana",
    ]  # fmt: skip


def test_the_format_is_one_answer_in_the_teachers_form() -> None:
    assert why("so \\boxed{4}", format=True) is None
    assert why("\\boxed{3}, no: \\boxed{4}", format=True) == (
        "format: 2 final answers and 0 broken ones in the form boxed"
    )
    assert why("\\boxed{", format=True) == "format: 0 final answers and 1 broken ones in the form boxed"
    assert why("<answer>4</answer>", format=True) is not None
    # What is thought is no answer, and whether it is thought hangs on the prompt.
    assert why("\\boxed{3} </think> \\boxed{4}", opens_think=True, format=True) is None
    assert why("so \\boxed{4}", opens_think=True, format=True) is not None
