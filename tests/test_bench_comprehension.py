"""What bench.comprehension sets side by side computes the same."""

from __future__ import annotations

import pytest

from bench.comprehension import Case, lab, ours, reference


def test_the_references_procedure_and_ours_give_the_same_scores() -> None:
    case = Case(name="lab", problems=2, max_prompt=24, max_response=140, max_tokens=256, repeats=1)
    policy, problems = lab(case)
    policy.model.requires_grad_(False)
    scores = ours(policy, problems, case)
    assert scores == pytest.approx(reference(policy, problems, case), abs=1e-5)
    # Two problems in four styles; after right reasoning the student finds the answer, after none it does not.
    assert len({round(score, 3) for score in scores}) > 4
