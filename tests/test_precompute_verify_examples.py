"""math-verify's own published examples, verified by ours as math-verify verifies them.

tests/data/math_verify_examples.jsonl holds the (gold, answer, expected) of its README and its tests (0.9.0),
duplicates left out. Where their text is a whole solution, `answer` is what stands in its last
box; solutions without a box are not among them. `departs` names why our verdict is the other one.
"""

from __future__ import annotations

import json
from pathlib import Path

from precompute.config import VerifyConfig
from precompute.verify.verifier import Verifier

FILE = Path(__file__).parent / "data" / "math_verify_examples.jsonl"
EXAMPLES = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]

DEPARTURES = {
    "sentence": "nothing is picked out of a sentence: an answer is all that stands in its place",
    "last": "of several boxes the last decides; they are not put together into a set",
    "comma": "a comma parts elements; no decimal comma",
    "digits": "they ask for two decimals; ours always agree in six",
    "option": "they ask for an option that is off by default (`strict`)",
    "range": "an inequality and the set of its solutions are one in both directions",
    "equation": "an equation gives a value only as `name = value`, or where it is a true chain of numbers",
    "string": "a gold that cannot be parsed earns nothing, be the strings equal",
    "e": "1 + 1/e is not 1 - 1/e: an upright e is no unit",
}


def test_every_example_is_verified_as_by_math_verify_or_departs_for_a_reason() -> None:
    with Verifier(VerifyConfig(workers=2, timeout=20.0)) as verifier:
        forms = ["\\boxed{%s}" if row.get("departs") == "last" else "<answer>%s</answer>" for row in EXAMPLES]
        pairs = [(form % row["answer"], row["gold"]) for form, row in zip(forms, EXAMPLES, strict=True)]
        verdicts = list(verifier.stream(pairs))
    otherwise = [
        (row, verdict.reason, verdict.parsed_gold, verdict.parsed_answer)
        for row, verdict in zip(EXAMPLES, verdicts, strict=True)
        if verdict.is_correct is (row["expected"] is ("departs" in row))
    ]
    assert otherwise == []
    # 24 sentences and 11 joined boxes are the form of answer that we demand; 10 are about mathematics.
    assert (len(EXAMPLES), sum("departs" in row for row in EXAMPLES)) == (240, 45)
    assert {row["departs"] for row in EXAMPLES if "departs" in row} == set(DEPARTURES)
