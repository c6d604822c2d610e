"""The built-in verifiers beside `math`, users' own in every form, and the choice of one for each problem."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from precompute.config import VerifyConfig
from precompute.verify.verifier import Verifier
from store.errors import ConfigError
from store.records import Problem

COLOURS = "Which colour is the sky?\nA) red\nB) deep blue\nC) green"


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    sources = {"numbers": "numeric", "colours": "choice", "words": "exact"}
    with Verifier(VerifyConfig(workers=1, timeout=20.0, by_source=sources)) as opened:
        yield opened


@pytest.mark.parametrize(
    ("source", "gold", "answer", "reason"),
    [
        ("numbers", "44", "44.0", "match"),
        ("numbers", "44", "29+7+2+6", "mismatch"),
        ("numbers", "1234.5", "\\$1,234.50", "match"),
        ("numbers", "1234", "1234 apples", "match"),
        ("numbers", "5", "5 million", "mismatch"),
        ("numbers", "\\frac{7}{4}", "1.75", "match"),
        ("numbers", "0.5", ".5", "match"),
        ("numbers", "1500", "1.5e3", "match"),
        ("numbers", "-3", "−3", "match"),
        ("colours", "B", "(B)", "match"),
        ("colours", "B", "B. deep blue", "match"),
        ("colours", "B", "\\text{B}", "match"),
        ("colours", "deep blue", "b", "match"),
        ("colours", "B", "Deep Blue", "match"),
        ("colours", "B", "A", "mismatch"),
        ("colours", "B", "(B) red", "mismatch"),
        ("colours", "B", "AB", "mismatch"),
        ("words", "east", "seat", "mismatch"),
        ("words", "ABCD", "DCBA", "mismatch"),
        ("words", "New  York", "$\\text{New York}$", "match"),
        ("words", "east", "East", "mismatch"),
    ],
)
def test_each_source_has_its_own_verifier(
    verifier: Verifier, source: str, gold: str, answer: str, reason: str
) -> None:
    problem = Problem(question=COLOURS, answer=gold, source=source)
    assert verifier.submit(f"So \\boxed{{{answer}}}", problem).result().reason == reason


def test_the_rows_verifier_comes_before_its_sources_and_the_default(verifier: Verifier) -> None:
    own = Problem(question="?", answer="44", source="words", verifier="numeric")
    assert [verifier.name_for(p) for p in (own, Problem(question="?", answer="44", source="words"))] == [
        *("numeric", "exact"),
    ]
    assert verifier.name_for(Problem(question="?", answer="44")) == "math"
    assert verifier.submit("\\boxed{44.0}", own).result().verifier == "numeric ampo.1"
    with pytest.raises(ConfigError, match=r"verifier of problem [0-9a-f]+ = 'maths': give one of"):
        verifier.submit("\\boxed{1}", Problem(question="?", answer="1", verifier="maths"))


def test_a_gold_is_checked_by_the_problems_own_verifier(verifier: Verifier) -> None:
    words, numbers = (Problem(question="?", answer="east", source=source) for source in ("words", "numbers"))
    assert [error is None for error in verifier.gold_errors([words, numbers])] == [True, False]


def test_the_questions_own_expression_is_no_answer(verifier: Verifier) -> None:
    problem = Problem(question="What is $29 + 7 \\times 2$?", answer="43")
    reasons = [
        verifier.submit(f"\\boxed{{{answer}}}", problem).result().reason
        for answer in ("29+7\\cdot 2", "29+14", "43")
    ]
    assert reasons == ["unsimplified", "match", "match"]
    lenient = VerifyConfig(workers=1, timeout=20.0, simplified=False)
    with Verifier(lenient) as other:
        assert other.submit("\\boxed{29+7\\cdot 2}", problem).result().is_correct


OWN = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "mine" and extra_info == {"level": 3}
    return {"score": 1.0 if solution_str.endswith(ground_truth) else 0.25, "acc": True}

def partly(answer, gold):
    return len(answer) / len(gold)
"""


def test_verls_functions_read_the_whole_response_and_need_no_marked_answer(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    problem = Problem(question="?", answer="east", source="mine", metadata={"level": 3})
    config = VerifyConfig(workers=1, timeout=20.0, default=f"{tmp_path / 'own.py'}:compute_score")
    with Verifier(config) as verifier:
        right, wrong = (verifier.submit(text, problem).result() for text in ("go east", "go west"))
    assert (right.is_correct, right.score, right.answer) == (True, 1.0, None)
    assert (wrong.is_correct, wrong.score, wrong.reason) == (False, 0.25, "mismatch")


def test_a_score_counts_as_correct_from_the_threshold_on(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    name = f"{tmp_path / 'own.py'}:partly"
    with Verifier(VerifyConfig(workers=1, timeout=20.0, default=name, threshold=0.5)) as verifier:
        verdicts = [verifier.submit(f"\\boxed{{{text}}}", "abcd").result() for text in ("ab", "a")]
    assert [(verdict.is_correct, verdict.score) for verdict in verdicts] == [(True, 0.5), (False, 0.25)]


def test_reasoning_gym_scores_by_its_own_rules() -> None:
    pytest.importorskip("reasoning_gym")
    # Whoever can reach 24 with all numbers is right, whatever the listed solution is.
    metadata = {"source_dataset": "countdown", "numbers": [4, 6], "target": 24, "expression": "4*6"}
    problem = Problem(question="Make 24 of 4, 6", answer="4*6", metadata=metadata)
    with Verifier(VerifyConfig(workers=1, timeout=60.0, default="reasoning_gym")) as verifier:
        verdicts = [verifier.submit(f"\\boxed{{{text}}}", problem).result() for text in ("6*4", "4+6")]
    assert [verdict.is_correct for verdict in verdicts] == [True, False]


def test_an_installed_package_offers_a_verifier_as_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "towns.py").write_text("def same(answer, gold):\n    return answer.lower() == gold.lower()\n")
    info = tmp_path / "towns-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: towns\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ampo.verifiers]\ntown = towns:same\n")
    monkeypatch.syspath_prepend(tmp_path)
    with Verifier(VerifyConfig(workers=1, timeout=20.0, default="town")) as verifier:
        verdicts = [verifier.submit(f"\\boxed{{{text}}}", "Rome").result() for text in ("ROME", "Pisa")]
    assert [verdict.is_correct for verdict in verdicts] == [True, False]
    assert verdicts[0].verifier.startswith("town ")
