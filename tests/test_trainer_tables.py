"""Tables of runs: what they hold, and that a person can read them."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console, RenderableType
from run_examples import prompt_of, sample_of

from store.records import Problem
from trainer.config import EvalConfig
from trainer.evaluation import EvalSample, evaluation_of
from trainer.method.groups import Group
from trainer.reports.tables import (
    curves_table,
    evaluation_table,
    evaluations_table,
)
from trainer.telemetry.console import completions_table


def rows(length: int, offset: float = 0.0) -> list[dict[str, Any]]:
    """Steps 1..length; every second one is evaluated."""
    return [
        {
            "step": step,
            "accuracy": offset + step / (2 * length),
            "groups/all_fail": 1 - step / length,
            "entropy": 0.1 + offset,
            "completions/mean_length": 1000.0 + step,
            "seconds/step": 4.0,
            **({"eval/pass@1": 0.5} if step % 2 == 0 else {}),
        }
        for step in range(1, length + 1)
    ]


def rendered(table: RenderableType, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_runs_are_compared_side_by_side() -> None:
    text = rendered(curves_table({"one": rows(20), "two": rows(10)}))
    # The last two of twenty: (19/40 + 20/40) / 2; the last of ten: 1/2.
    assert [line.split() for line in text.splitlines() if "accuracy" in line] == [
        ["accuracy", "0.487", "0.500"]
    ]


def test_one_run_has_its_curve_as_text() -> None:
    (line,) = [each for each in rendered(curves_table({"one": rows(8)})).splitlines() if "accuracy" in each]
    # From 1/16 to 8/16.
    assert line.split() == ["accuracy", "0.500", "0.062", "0.062", "0.500", "▁▂▃▄▅▆▇█"]


def test_six_runs_with_long_names_fit_eighty_columns_with_every_number_whole() -> None:
    names = ("accuracy", "comprehension/selected_mean", "memory/peak_mib", "seconds/step", "eval/pass@1",
             "eval/pass@8", "eval/mean_length", "eval/cut_share")  # fmt: skip
    runs = {
        f"qwen2.5-7b-ampo-seed-{n}": [{"step": 510, **dict.fromkeys(names, 12_345.678)}] for n in range(6)
    }
    for table in (curves_table(runs), evaluations_table(runs)):
        text = rendered(table)
        assert "…" not in text
        assert text.count("12,346") == 24  # 4 metrics of 6 runs
        assert max(map(len, text.splitlines())) <= 80


def test_a_long_response_shows_its_beginning_and_its_answer() -> None:
    text = "Let us see. " + "and so on " * 200 + "\\boxed{42}"
    sample = sample_of(1.0, text=text)
    group = Group(prompt=prompt_of(Problem(question="6*7", answer="42")), samples=(sample, sample))
    shown = rendered(completions_table(3, [group], 1))
    assert "Let us see." in shown
    assert "\\boxed{42}" in "".join(shown.split())
    assert len(shown.splitlines()) < 20


def test_an_evaluation_fits_eighty_columns_with_every_interval_whole() -> None:
    problems = [
        Problem(question=f"{source}{n}", answer="1", source=source)
        for source in ("aime", "olympiad_bench")
        for n in range(5)
    ]
    rows = [
        EvalSample(
            problem_id=problem.problem_id,
            source=problem.source,
            sample_index=s,
            is_correct=(n + s) % 3 == 0,
            has_format=True,
            n_tokens=1200,
            finish_reason="stop",
            text="",
        )
        for n, problem in enumerate(problems)
        for s in range(32)
    ]
    sources = {problem.problem_id: problem.source for problem in problems}
    evaluation = evaluation_of(EvalConfig(samples=32, k=(1, 8, 32)), rows, sources)
    text = rendered(evaluation_table("runs/ampo/checkpoints/step-000510", evaluation))
    assert max(map(len, text.splitlines())) <= 80
    # Of 32 samples 11 are right where n % 3 is 0 or 2, else 10: 107 of 320.
    assert "0.334" in text
    # avg@n and pass@8 of both sources and of all have an interval; pass@32 is 1 everywhere. And the caption.
    assert len(re.findall(r"\[[.\d]+ [.\d]+\]", text)) == 3 * 2
