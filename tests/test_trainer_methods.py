"""The methods of configs/methods: each loss, trigger and place by hand; each file trains as it says."""

from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer
from process_runs import cut_back
from run_examples import (
    PROBLEMS,
    assert_same_run,
    metrics_of,
    prompt_of,
    rows_of,
    sample_of,
    settings,
    teacher,
)
from test_trainer_distributed import assert_close
from test_trainer_loss import COUNTS, INPUTS, logs

from precompute.verify.verifier import MATH_VERSIONS
from store.records import Problem
from store.writer import StoreWriter
from trainer.config import GuidanceConfig, TrainConfig, read_config
from trainer.method.groups import Group
from trainer.method.guidance import TRIGGERS, guidance_size
from trainer.method.loss import GUIDED_LOSSES, make_policy_loss
from trainer.method.update import member_advantages, sequences_of
from trainer.telemetry.console import TrainReporter
from trainer.train import train
from trainer.variants import SUPERVISED, guided_weight, srft_own

METHODS = Path(__file__).parents[1] / "configs" / "methods"
NAMES = sorted(path.stem for path in METHODS.glob("*.toml"))
RUNNING = [name for name in NAMES if name != "ampo_ratio"]
"""Without the one whose teachers must have the student's tokenizer, see test_trainer_guidance."""
# Row 0 is a trace of two tokens with p = 0.6 and 0.2, p_old = 0.4 and 0.25, H = (1 + 2) / 2, A = 1.
TRACE = replace(INPUTS, is_teacher=torch.tensor([True, False]))
GUIDED = replace(COUNTS, student_sequences=1, student_tokens=2, guided_tokens=2)


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("nll", [math.log(0.6), math.log(0.2)]),
        ("nll_p", [0.6 * math.log(0.6), 0.2 * math.log(0.2)]),
        ("nll_phi", [0.24 * math.log(0.6), 0.16 * math.log(0.2)]),  # 0.6 * 0.4 and 0.2 * 0.8
        ("nll_entropy", [0.5 * math.exp(-1.5) * math.log(0.6), 0.5 * math.exp(-1.5) * math.log(0.2)]),
        # The line above, and 0.6 / (0.6 + 0.1) and 0.2 / (0.2 + 0.1).
        (
            "srft",
            [
                0.5 * math.exp(-1.5) * math.log(0.6) + 6 / 7,
                0.5 * math.exp(-1.5) * math.log(0.2) + 2 / 3,
            ],
        ),
        # 2 * 0.6 / (0.4 + 0.7) * sqrt(0.4) and 2 * 0.2 / (0.25 + 0.625) * sqrt(0.8)
        ("mixture", [1.2 / 1.1 * math.sqrt(0.4), 0.4 / 0.875 * math.sqrt(0.8)]),
        ("policy", [1.2, 0.8]),  # min(1.5, 1.2) and min(0.8, 0.8)
    ],
)
def test_guided_terms_by_hand(name: str, terms: list[float]) -> None:
    found, weight, _ = GUIDED_LOSSES[name](TRACE, GUIDED, GuidanceConfig())
    assert found[0].tolist() == pytest.approx(terms, rel=1e-5)
    assert weight == (0.5 if name in SUPERVISED else None)  # 1 / 2 guided tokens


def test_a_supervised_loss_leaves_the_students_denominators_alone() -> None:
    # grpo: the student's row alone is 1 sequence of 2 tokens, so each weighs 1/2; without the trace likewise.
    options = TrainConfig(loss_type="grpo", entropy_coef=0.0)
    loss = make_policy_loss(options, GuidanceConfig(loss="nll"))
    both = float(loss(TRACE, replace(GUIDED, sequences=2))[0])
    nll = -(math.log(0.6) + math.log(0.2)) / 2
    student = 5.8 / 2  # -(min(-5, -1.2) + min(-0.8, -0.8)) / 2 by test_trainer_loss
    assert both == pytest.approx(nll + student, rel=1e-5)
    # mu = 0.25 and its complement.
    weighed = replace(GUIDED, sequences=2, guided_weight=0.25, student_weight=0.75)
    assert float(loss(TRACE, weighed)[0]) == pytest.approx(0.25 * nll + 0.75 * student, rel=1e-5)


def test_cispo_keeps_the_gradient_of_a_clipped_token() -> None:
    new = logs([0.6, 0.2]).requires_grad_()
    one = replace(INPUTS, logprobs=new, old_logprobs=logs([0.1, 0.25]), entropy=torch.zeros(1, 2))
    one = replace(one, response_mask=one.response_mask[:1], is_teacher=one.is_teacher[:1])
    one = replace(one, advantages=one.advantages[:1], teacher_logprobs=one.teacher_logprobs[:1])
    train_config = TrainConfig(objective="cispo", loss_type="grpo", entropy_coef=0.0, eps_high=4.0)
    counts = replace(COUNTS, sequences=1, student_sequences=1, student_tokens=2)
    loss, sums = make_policy_loss(train_config, GuidanceConfig())(one, counts)
    loss.backward()  # type: ignore[no-untyped-call]
    # Ratios 6 -> 5 and 0.8: gradients -5/2 and -0.8/2.
    assert new.grad is not None
    assert new.grad.tolist()[0] == pytest.approx([-2.5, -0.4])
    assert sums["clip_ratio/high_mean"] == (1.0, 2)


def test_srft_raises_good_responses_by_their_entropy_and_lowers_bad_ones() -> None:
    # Row 0, A = 1: 0.1 e^1.5 log p with H = (1 + 2) / 2; row 1, A = -1: -log p, whatever A's size.
    terms, _ = srft_own(INPUTS, TrainConfig())
    up = 0.1 * math.exp(1.5)
    assert terms[0].tolist() == pytest.approx([up * math.log(0.6), up * math.log(0.2)])
    assert terms[1].tolist() == pytest.approx([-math.log(0.5), -math.log(0.4)])
    assert srft_own(replace(INPUTS, advantages=torch.zeros(2, 1)), TrainConfig())[0].abs().max() == 0


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({"weight": 0.5}, [1, 10], [0.5, 0.5]),
        # Up to 0.8 in two steps, then evenly down to 0 at step 5.
        (
            {"weight": 0.8, "weight_schedule": "linear", "weight_warmup": 2},
            [1, 2, 3, 4, 5],
            [0.4, 0.8, 0.8, 0.4, 0],
        ),
        # Half-way the cosine is in the middle of 0.9 and 0.1.
        ({"weight": 0.9, "weight_schedule": "cosine", "weight_end": 0.1}, [1, 3, 5], [0.9, 0.5, 0.1]),
        ({"weight": 0.7, "weight_schedule": "after", "weight_warmup": 2}, [2, 3, 5], [0.0, 0.7, 0.7]),
    ],
)
def test_the_weight_is_a_function_of_the_step(
    options: dict[str, Any], steps: list[int], expected: list[float]
) -> None:
    found = [guided_weight(step, 5, GuidanceConfig(**options)) for step in steps]
    assert found == pytest.approx(expected)


def group_of(*correct: bool) -> Group:
    samples = tuple(sample_of(float(each)) for each in correct)
    return Group(prompt=prompt_of(Problem(question="1+1", answer="2")), samples=samples)


def test_triggers_and_places() -> None:
    config, rng = GuidanceConfig(solved_at_most=1, rate=0.5), Random(0)
    fires = TRIGGERS["solved_at_most"]
    assert [fires(group_of(*c), config, rng) for c in ((True, False), (True, True))] == [True, False]
    hybrid = [TRIGGERS["hybrid"](group_of(True, False), config, rng) for _ in range(200)]
    assert 70 < sum(hybrid) < 130  # 100 expected
    assert TRIGGERS["hybrid"](group_of(False, False), config, rng)
    solved = group_of(True, True, True, True)
    sizes = {
        place: guidance_size(solved, 9, GuidanceConfig(k=5, place=place))
        for place in ("failed", "any", "extra")
    }
    assert sizes == {"failed": 0, "any": 3, "extra": 5}


def test_traces_beside_or_instead_of_the_students_samples() -> None:
    trace = sample_of(1.0, trace_id="t", teacher="ada")
    failed = group_of(False, False)
    beside, instead = replace(failed, extra=(trace,)), replace(failed, extra=(trace,), own_train=False)
    # Rewards 0, 0, 1: mean 1/3. Against the student's own mean of 0 the trace has the advantage 1.
    assert member_advantages([beside], scale="none")[0] == pytest.approx([-1 / 3, -1 / 3, 2 / 3])
    assert member_advantages([beside], scale="none", baseline="student")[0] == [0.0, 0.0, 1.0]
    alone = member_advantages([instead], scale="none")
    assert alone == [[0.0]]
    assert sequences_of([instead], alone) == []
    (sequence,) = sequences_of([instead], alone, supervised=True)
    assert sequence.is_teacher


def shrunk(name: str, world: Path, model: Path, **more: Any) -> Any:
    """The file as it ships, on the tiny world: paths and sizes are changed, the method is not."""
    chosen = tomllib.loads((METHODS / f"{name}.toml").read_text())
    small: dict[str, Any] = {"train__max_steps": 2 * ("max_steps" not in chosen.get("train", {}))}
    small |= {"sft__steps": 2 * ("sft" in chosen), "sft__traces_per_step": 4, "train__seed": 1}
    small |= {
        "rollout__max_completion_length": 40,
        "guidance__weight_warmup": 0,
        "guidance__buffer": 3,
        "guidance__start": 0,
        "rollout__max_prompt_length": 128,
        **more,
    }
    return read_config(str(METHODS / f"{name}.toml"), settings(world, model, run__name=name, **small))


@pytest.mark.parametrize("name", RUNNING)
def test_a_method_trains_as_its_file_says(name: str, world: Path, model_dir: Path) -> None:
    config = shrunk(name, world, model_dir)
    run = train(config, reporter=TrainReporter()).run
    rows = metrics_of(run)
    assert sum("sft/loss" in row for row in rows) == config.sft.steps
    assert sum("reward" in row for row in rows) == config.train.max_steps
    queries, guidance = rows_of(run, "queries"), config.guidance
    assert bool(queries) == (guidance.trigger != "never" and config.train.max_steps > 0)
    for file, samples in rows_of(run, "rollouts").items():
        used = {row["problem_id"] for row in queries.get(file, []) if row["selected"]}
        for problem in {row["problem_id"] for row in samples}:
            rows_here = [row for row in samples if row["problem_id"] == problem]
            own = [row for row in rows_here if row["trace_id"] is None]
            traces = [row for row in rows_here if row["trace_id"] is not None]
            assert bool(traces) == (problem in used and guidance.place != "buffer")
            most = 4 if guidance.insert != "trace" and guidance.place == "instead" else guidance.k
            assert len(traces) <= most
            wrote = {"trace": "teacher", "context": "teacher"}.get(guidance.insert, "student")
            assert {row["origin"] for row in traces} <= {wrote}
            replaced = {"extra": 0, "instead": len(own) if traces else 0}.get(guidance.place, len(traces))
            assert sum(row["replaced"] for row in own) == replaced
    assert all(math.isfinite(row["loss"]) for row in rows if row.get("loss") is not None)


def asks_the_store(name: str) -> bool:
    guidance = tomllib.loads((METHODS / f"{name}.toml").read_text()).get("guidance", {})
    return guidance.get("trigger", "never") != "never"


@pytest.mark.parametrize("name", filter(asks_the_store, RUNNING))
def test_an_empty_store_gives_grpo_to_the_bit(
    name: str, world: Path, model_dir: Path, tmp_path: Path
) -> None:
    with StoreWriter.open(tmp_path / "empty", verifiers=MATH_VERSIONS) as writer:
        writer.register_teacher(teacher("ada"))
    here = {"sft__steps": 0, "store__path": str(tmp_path / "empty")}
    rows = []
    for changes in ({}, {"guidance__trigger": "never"}):
        config = shrunk(name, world, model_dir, run__dir=str(tmp_path / str(len(rows))), **here, **changes)
        run = train(config, reporter=TrainReporter()).run
        rows.append([(row.get("loss"), row.get("grad_norm"), row["reward"]) for row in metrics_of(run)])
    assert rows[0] == rows[1]


KINDS = ["relift", "srft", "prefix_rft", "bread", "ghpo", "sdft"]
"""One file of each kind of machinery that the others do not enter."""


@pytest.mark.parametrize("name", KINDS)
def test_neither_micro_batches_nor_a_resume_change_a_method(
    name: str, world: Path, model_dir: Path, tmp_path: Path
) -> None:
    def trained(folder: str, **more: Any) -> Path:
        # Rewards of lengths differ where no random sample is right.
        here = {"run__dir": str(tmp_path / folder), "train__max_steps": 4, "rewards__length": 1.0, **more}
        return train(shrunk(name, world, model_dir, **here), reporter=TrainReporter()).run

    whole, cut = trained("whole"), trained("cut", train__max_tokens_per_microbatch=64)
    assert any(row["loss"] for row in metrics_of(whole))
    assert_close(metrics_of(whole), metrics_of(cut))
    cut_back(whole, tmp_path / "resumed" / name)
    assert_same_run(whole, trained("resumed"), "step-000004")


def test_the_buffer_trains_the_newest_traces_once_enough_wait(
    world: Path, model_dir: Path, tmp_path: Path
) -> None:
    config = shrunk("relift", world, model_dir, run__dir=str(tmp_path), guidance__buffer=2)
    run = train(config, reporter=TrainReporter()).run
    first, second = rows_of(run, "queries").values()
    selected = [[row["problem_id"] for row in rows if row["selected"]] for rows in (first, second)]
    assert [len(each) for each in selected] == [3, 2]
    # Step 1: three come, the first two train, the third waits. Step 2: two come and train, it waits on.
    assert [(row["buffer/waiting"], "buffer/loss" in row) for row in metrics_of(run)] == [(1, True)] * 2
    saved = torch.load(run / "checkpoints" / "step-000002" / "optimizer.pt", weights_only=True)
    ((prompt_ids, trace_ids),) = saved["buffer"]["waiting"]
    oldest = next(problem for problem in PROBLEMS if problem.problem_id == selected[0][2])
    read = tiny_tokenizer().decode
    assert read(prompt_ids, skip_special_tokens=True) == oldest.question
    assert f"\\boxed{{{oldest.answer}}}" in read(trace_ids)


def test_the_files_are_short_and_named_after_their_runs() -> None:
    for name in NAMES:
        text = (METHODS / f"{name}.toml").read_text()
        assert len(text.splitlines()) <= 20
        assert tomllib.loads(text)["run"]["name"] == name
