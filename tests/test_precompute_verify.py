"""Verdicts: what is equal, in which order, by which verifier."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from precompute.config import VerifyConfig
from precompute.verify.registry import verifier_record
from precompute.verify.verifier import MATH_VERSIONS, MAX_ANSWER_CHARS, Verifier, verify_answer
from store.errors import ConfigError
from store.records import Problem


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(VerifyConfig(workers=2, timeout=5.0)) as shared:
        yield shared


def is_match(verifier: Verifier, gold: str, answer: str) -> bool:
    verdict = verifier.submit(f"so \\boxed{{{answer}}}", gold).result()
    assert verdict.is_correct is (verdict.reason == "match")
    return verdict.is_correct


EQUAL = [
    ("\\frac{7}{4}", "7/4"),
    ("\\frac{7}{4}", "1.75"),
    ("7.0", "7"),
    ("7425000", "7,425,000"),
    ("1000", "1 000"),
    ("11111111100", "11,\\! 111,\\! 111,\\! 100"),
    ("\\frac{7}{4}", "1 3/4"),
    ("\\frac{7}{4}", "1\\frac{3}{4}"),
    ("1/3", "0.333333"),
    ("1/12", "0.0833333333333333"),
    ("1/60", "0.0166667"),
    ("6.63e-34", "6.63 \\times 10^{-34}"),
    ("2^{31}", "2147483648"),
    ("\\sqrt{6}", "\\sqrt2\\sqrt3"),
    ("\\tan^2(y)+1", "\\sec^2(y)"),
    ("6", "2(3)"),
    ("12", "2\\binom{4}{2}"),
    ("x = 5", "5"),
    ("5", "x = 5"),
    ("2x+4y-3=0", "y=-\\frac{1}{2}x+\\frac{3}{4}"),
    ("x^2/4 + y^2/3 = 1", "x^2/16 + y^2/12 = 1/4"),
    ("x < 1", "-x > -1"),
    ("-2 \\le x \\le 7", "x \\in [-2,7]"),
    ("x \\in [-2,7]", "-2 \\le x \\le 7"),
    ("{1,3} \\cup {2,4}", "{1,2,3,4}"),
    ("-2,1", "1,-2"),
    ("(1,\\frac{9}{2})", "(1,4.5)"),
    ("3 \\pm 2\\sqrt{2}", "3 \\pm 2 \\sqrt{2}"),
    ("\\begin{pmatrix}6 & 8\\\\10 & 12\\end{pmatrix}", "\\begin{bmatrix}6 & 8\\\\10 & 12\\end{bmatrix}"),
    ("90^\\circ", "90"),
    ("15\\mbox{ cm}^2", "15"),
    ("C", "\\text{(C)}"),
    ("\\text{Evelyn}", "\\text{Evelyn}"),
    ("$42$", "\\(42\\)."),
    ("42", "\\boxed{42}"),
    ("42", "The final answer is $42$."),
    ("28\\%", "28"),
    ("5\\%", "5\\%"),
    ("1/2", "50\\%"),
    ("-5", "−5"),
    ("-5", "-5"),
    ("2e", "2\\mathrm{e}"),
    ("2i", "2\\operatorname{i}"),
]

DIFFERENT = [
    ("1/3", "0.3333"),
    ("\\pi", "3.14159"),
    ("2", "2.0001"),
    ("1", "1.0000001"),
    ("10^{20}", "10^{20}+1"),
    ("10^{-20}", "10^{-22}"),
    ("6.63e-34", "6.63e-36"),
    ("0", "10^{-20}"),
    ("1/60", "0.016667"),
    ("\\{10^{-9}, 1\\}", "\\{0, 1\\}"),
    ("5", "500"),
    ("5", "-5"),
    ("500", "5"),
    ("5", "0.05"),
    ("0.28", "28"),
    ("28", "28/100"),
    ("5\\%", "500\\%"),
    ("10", "10^10^10^10"),
    ("6", "4 2"),
    ("2t", "2"),
    ("2", "2t"),
    ("\\frac{1}{m} t", "\\frac{1}{m}"),
    ("2", "2\\mathrm{i}"),
    ("2", "2\\operatorname{e}"),
    ("1-\\frac{1}{\\mathrm{e}}", "1+\\frac{1}{\\mathrm{e}}"),
    ("5", "2(3)"),
    ("42", "41 or 42"),
    ("42", "it is not 42"),
    ("4", "4\\sqrt{2}"),
    ("x=5", "y=5"),
    ("x^2+1=0", "x^2+2=0"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "[0,1]"),
    ("1,2,3", "1,2,3,..."),
    ("32349", "32, 349"),
    ("\\begin{pmatrix}1 & 2\\end{pmatrix}", "\\begin{pmatrix}1 & 3\\end{pmatrix}"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_mathematics_matches(verifier: Verifier, gold: str, answer: str) -> None:
    assert is_match(verifier, gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_mathematics_does_not(verifier: Verifier, gold: str, answer: str) -> None:
    assert not is_match(verifier, gold, answer)


@pytest.mark.parametrize(
    "gold", ["np.arcsin(10/13)", "E_{1},E_{2}", "1/0", "", "5\0", "{" * 20, "9" * 20_000]
)
def test_a_gold_that_cannot_be_parsed_earns_nothing(verifier: Verifier, gold: str) -> None:
    verdict = verifier.submit(f"<answer>{gold or 5}</answer>", gold).result()
    assert not verdict.is_correct
    if len(gold) <= MAX_ANSWER_CHARS:
        assert verdict.reason == "gold_unparseable"
    assert [error is None for error in verifier.gold_errors([gold, "5"])] == [False, True]


def test_equal_pairs_share_a_verdict_which_a_waiting_caller_may_cancel_alone(verifier: Verifier) -> None:
    futures = [verifier.submit(f"\\boxed{{{i % 2}.125}}", "2^{-3}") for i in range(100)]
    futures[0].cancel()
    assert [future.result().is_correct for future in futures[2:]] == [True, False] * 49


def test_any_thread_and_any_event_loop_may_submit(verifier: Verifier) -> None:
    verdicts = []
    threads = [
        threading.Thread(target=lambda i=i: verdicts.append(is_match(verifier, f"{i}.25", f"{i}\\frac14")))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 8

    async def submit() -> bool:
        return (await asyncio.wrap_future(verifier.submit("\\boxed{2.5}", "\\frac{5}{2}"))).is_correct

    assert asyncio.run(submit())


def test_verdicts_come_in_the_order_of_the_pairs(verifier: Verifier) -> None:
    pairs = [("\\boxed{5}", "5"), ("none", "5"), ("<answer>5</answer>", "6"), ("\\boxed{4} \\boxed{5}", "5")]
    verdicts = list(verifier.stream(pairs))
    assert [verdict.reason for verdict in verdicts] == ["match", "no_answer", "mismatch", "match"]
    assert [verdict.n_answers for verdict in verdicts] == [1, 0, 1, 2]
    assert [verdict.answer_start for verdict in verdicts] == [7, None, 8, 17]
    assert [verdict.reason for verdict in verifier.stream(pairs[2:], "boxed")] == ["no_answer", "match"]


def test_verify_answer_needs_nothing_but_strings() -> None:
    verdict = verify_answer(response="so \\boxed{1.75}", gold="\\frac{7}{4}")
    assert (verdict.parsed_answer, verdict.parsed_gold) == ("7/4", "7/4")
    # s=0, o=1, blank=2, the backslash=3, the brace=9
    assert (verdict.is_correct, verdict.reason, verdict.answer_start) == (True, "match", 10)
    assert not verify_answer(response="so 1.75", gold="\\frac{7}{4}", timeout=1.0).is_correct
    assert MATH_VERSIONS["math-verify"].startswith("0.9.0+antlr4.13.2")


CITIES = """
import sys, time
def same_city(answer, gold, *, question, response, metadata):
    if gold == "nowhere":
        return None
    if gold == "crash":
        sys.exit(1)
    if gold == "forever":
        time.sleep(60)
    if gold == "half":
        return 0.5
    if question == "Where? Not in a box.":
        return None
    print("nobody reads this")
    return answer.lower() in (gold.lower(), metadata.get("old name")) and question in response
"""


def test_a_users_verifier_runs_in_the_same_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cities.py").write_text(CITIES)
    monkeypatch.chdir(tmp_path)
    golds = ["paris", "rome", "nowhere", "crash", "forever", "half"]
    with Verifier(VerifyConfig(workers=1, timeout=1.0, default="cities.py:same_city")) as verifier:
        futures = [verifier.submit("\\boxed{Paris}", gold) for gold in golds]
        city = Problem(question="Lutetia?", answer="Paris", metadata={"old name": "lutetia"})
        old = verifier.submit("Lutetia? \\boxed{lutetia}", city)
        assert [future.result().reason for future in futures] == [
            *("match", "mismatch", "unjudged", "error", "timeout", "mismatch"),
        ]
        assert old.result().is_correct
        assert verifier.gold_errors(["paris", "nowhere"]) == [None, "the verifier cannot judge it"]
        assert verifier.gold_errors([Problem(question="Where? Not in a box.", answer="rome")]) != [None]
        paris, rome = (Problem(question=question, answer="paris") for question in ("Paris?", "Rome?"))
        rows = [("Paris? \\boxed{Paris}", paris), ("\\boxed{Paris}", rome)]
        assert [verdict.is_correct for verdict in verifier.stream(rows)] == [True, False]
    name, version = verifier_record("cities.py:same_city")
    assert (name, len(version)) == ("cities.py:same_city", 16)
    (tmp_path / "other.py").write_text(CITIES + "\n")
    assert verifier_record("other.py:same_city")[1] != version


def test_an_unknown_verifier_is_one_line_that_names_the_key() -> None:
    with pytest.raises(
        ConfigError,
        match=r"verify\.default = 'maths': give one of choice, exact, math, .*, or module:function",
    ):
        Verifier(VerifyConfig(default="maths"))
