"""math-verify's own published examples, verified by ours as math-verify verifies them.

tests/data/math_verify_examples.jsonl holds the (gold, answer, expected) of its README and its tests (0.9.0),
duplicates left out. Where their text is a whole solution, `answer` is what stands in its last
box; solutions without a box are not among them. `departs` names why our verdict is the other one.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from precompute.verify.verifier import Verifier

EXAMPLES = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "math_verify_examples.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]

DEPARTURES = {
    "sentence": "nothing is picked out of a sentence: an answer is all that stands in its place",
    "last": "of several boxes the last decides; they are not put together into a set",
    "comma": "a comma parts elements; no decimal comma",
    "digits": "they ask for two decimals; ours always agree in six",
    "option": "they ask for an option that is off by default (`strict`, `allow_set_relation_comp`)",
    "string": "a gold that cannot be parsed earns nothing, be the strings equal",
    "e": "1 + 1/e is not 1 - 1/e: an upright e is no unit",
}


def test_every_example_is_verified_as_by_math_verify_or_departs_for_a_reason() -> None:
    with Verifier(workers=2, timeout=20.0) as verifier:
        pairs = [(f"<answer>{row['answer']}</answer>", row["gold"]) for row in EXAMPLES]
        pairs = [
            (f"\\boxed{{{row['answer']}}}", row["gold"]) if row.get("departs") == "last" else pair
            for row, pair in zip(EXAMPLES, pairs, strict=True)
        ]
        verdicts = list(verifier.stream(pairs))
    otherwise = [
        (row, verdict.reason, verdict.parsed_gold, verdict.parsed_answer)
        for row, verdict in zip(EXAMPLES, verdicts, strict=True)
        if verdict.is_correct is (row["expected"] is ("departs" in row))
    ]
    assert otherwise == []


def test_departures_are_few_and_every_one_has_its_reason_and_is_a_mismatch() -> None:
    departing = [row for row in EXAMPLES if "departs" in row]
    reasons = Counter(row["departs"] for row in departing)
    assert set(reasons) == set(DEPARTURES)
    assert len(EXAMPLES) == 240
    # 24 sentences and 11 joined boxes are the form of answer that we demand; 10 are about mathematics.
    assert (reasons.total(), reasons["sentence"], reasons["last"]) == (45, 24, 11)
    assert all(row["expected"] for row in departing)
