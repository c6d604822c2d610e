"""SFT: what a supervised step computes, in which order, and that nothing else changes it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer, token_logprobs
from run_examples import PROBLEMS, config_of, metrics_of, run, weights_of

from store.errors import RunError, StoreError
from store.reader import TraceStore
from trainer.config import Config
from trainer.method.groups import Prompt
from trainer.method.sft import Sft
from trainer.run.checkpoint import checkpoints
from trainer.run.prompts import fitting_prompts
from trainer.run.setup import trace_reader
from trainer.student.policy import Policy
from trainer.telemetry.console import TrainReporter

SFT = {
    "sft__steps": 4,
    "sft__traces_per_step": 6,
    "sft__learning_rate": 1e-2,
    "rollout__max_completion_length": 32,
}


@pytest.fixture
def store(world: Path) -> Iterator[TraceStore]:
    with TraceStore(world / "traces") as opened:
        yield opened


def prompts_of(config: Config) -> list[Prompt]:
    return fitting_prompts(config, PROBLEMS, tiny_tokenizer(), TrainReporter())


def sft_of(world: Path, store: TraceStore, *, temperature: float = 1.0, **changes: Any) -> Sft:
    config = config_of(world, world, **{**SFT, **changes})
    policy = Policy(tiny_model(), tiny_tokenizer(), dtype=torch.float32, temperature=temperature)
    return Sft(config, policy, trace_reader(config, store, policy, TrainReporter()), prompts_of(config))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_loss_is_the_mean_over_all_trace_tokens_of_the_step(
    world: Path, store: TraceStore, temperature: float
) -> None:
    # At whatever temperature the student samples: a trace is trained on as it is written.
    sft = sft_of(world, store, temperature=temperature)
    total, tokens = 0.0, 0
    for sequence in sft.sequences_of(1):
        ids = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
        with torch.no_grad():
            logprobs = token_logprobs(sft.policy.model(ids).logits, ids)
        total -= float(logprobs[0, len(sequence.prompt_ids) :].sum())
        tokens += len(sequence.response_ids)
    row = sft.step(1)
    assert row["sft/loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert (row["sft/tokens"], row["sft/traces"]) == (tokens, 6)


def test_a_uniform_student_loses_ln_v_a_token(world: Path, store: TraceStore) -> None:
    sft = sft_of(world, store)
    sft.policy.model.lm_head.weight.data.zero_()
    sft.policy.model.model.embed_tokens.weight.data.zero_()
    row = sft.step(1)
    assert row["sft/loss"] == pytest.approx(math.log(sft.policy.model.config.vocab_size), rel=1e-6)
    assert row["sft/entropy"] == pytest.approx(row["sft/loss"], rel=1e-6)


def test_the_micro_batch_budget_changes_neither_loss_nor_weights(world: Path, store: TraceStore) -> None:
    found = []
    for budget in (32768, 60, 1):  # one micro-batch, some, one a trace
        sft = sft_of(world, store, train__max_tokens_per_microbatch=budget, train__max_grad_norm=1e9)
        # Plain descent: Adam would blow rounding at a gradient near zero up to whole steps.
        sft.updater.optimizer = torch.optim.SGD(sft.policy.model.parameters(), lr=1.0)
        loss = sft.step(1)["sft/loss"]
        found.append((loss, torch.cat([p.detach().flatten() for p in sft.policy.model.parameters()])))
    for loss, weights in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(weights, found[0][1], rtol=1e-5, atol=1e-6)


def ids_of(sft: Sft, step: int) -> list[tuple[int, ...]]:
    return [(*s.prompt_ids, *s.response_ids) for s in sft.sequences_of(step)]


def test_an_epoch_holds_each_trace_at_most_once_and_the_next_is_in_another_order(
    world: Path, store: TraceStore
) -> None:
    # 16 traces, 4 a step: four steps an epoch, nothing left over.
    sft = sft_of(world, store, sft__traces_per_step=4)
    steps = [ids_of(sft, number) for number in range(1, 9)]
    first, second = (Counter(chain.from_iterable(epoch)) for epoch in (steps[:4], steps[4:]))
    assert first == second
    assert set(first.values()) == {1}
    assert len(first) == 16
    assert steps[:4] != steps[4:]


def test_the_order_is_a_function_of_the_seed_alone(world: Path, store: TraceStore) -> None:
    one, same = sft_of(world, store), sft_of(world, store)
    one.sequences_of(3)
    assert [ids_of(one, n) for n in (1, 2)] == [ids_of(same, n) for n in (1, 2)]
    assert ids_of(one, 1) != ids_of(sft_of(world, store, train__seed=1), 1)


def test_the_shortest_trace_of_each_problem_or_all(world: Path, store: TraceStore) -> None:
    # bob writes the box alone, ada says "we add and get " before it.
    texts = [
        tiny_tokenizer().decode(sequence.response_ids)
        for sequence in sft_of(world, store, sft__traces="shortest", sft__traces_per_step=8).sequences_of(1)
    ]
    assert sorted(texts) == sorted(f"\\boxed{{{p.answer}}}<eos>" for i, p in enumerate(PROBLEMS) if i % 3)
    assert len(sft_of(world, store).chosen) == 16


def test_traces_that_do_not_fit_and_teachers_that_are_not_named_are_left_out(
    world: Path, store: TraceStore
) -> None:
    # "\boxed{10}" is 10 tokens and EOS; ada's are 15 longer.
    fitting = sft_of(world, store, rollout__max_completion_length=12)
    assert {len(s.response_ids) <= 12 for s in fitting.sequences_of(1)} == {True}
    assert len(fitting.chosen) == 8
    assert len(sft_of(world, store, guidance__teachers=["ada"]).chosen) == 8


def test_too_few_traces_are_an_error_before_the_first_step(world: Path, store: TraceStore) -> None:
    with pytest.raises(StoreError, match=r"traces_per_step = 17, but the store has 16 traces"):
        sft_of(world, store, sft__traces_per_step=17)


def test_rl_goes_on_from_the_supervised_weights_with_a_fresh_optimizer(world: Path, model_dir: Path) -> None:
    both = run(world, model_dir, run__name="both", train__max_steps=1, **SFT)
    alone = run(world, model_dir, run__name="alone", train__max_steps=0, **SFT)
    assert [path.name for path in checkpoints(alone.run / "checkpoints")] == ["sft-000002", "sft-000004"]
    # RL of its own on the supervised student is what both together are.
    warm = alone.run / "checkpoints" / "sft-000004"
    after = run(world, warm, run__name="after", train__max_steps=1, rollout__max_completion_length=32)
    assert metrics_of(both.run)[4:] == metrics_of(after.run)
    assert weights_of(both.run, "step-000001") == weights_of(after.run, "step-000001")
    assert [row["sft/step"] for row in metrics_of(both.run)[:4]] == [1, 2, 3, 4]


def test_sft_alone_ends_with_its_evaluation(world: Path, model_dir: Path) -> None:
    changes = {"problems__eval": str(world / "train.jsonl"), "eval__every": 1, "eval__samples": 1}
    report = run(world, model_dir, run__name="sft", train__max_steps=0, eval__k=[1], **changes, **SFT)
    rows = metrics_of(report.run)
    assert [("sft/loss" in row, "eval/pass@1" in row) for row in rows] == [(True, False)] * 4 + [
        (False, True)
    ]
    assert str(report.done) == "SFT step 4"
    assert report.interrupted_by is None
    again = run(world, model_dir, run__name="sft", train__max_steps=0, eval__k=[1], **changes, **SFT)
    assert metrics_of(again.run) == rows


def test_sft_needs_a_store_even_where_rl_never_queries(world: Path, model_dir: Path) -> None:
    changes = {**SFT, "guidance__trigger": "never", "train__max_steps": 1}
    report = run(world, model_dir, run__name="sft-grpo", **changes)
    assert report.done.sft_step == 4
    assert not list((report.run / "queries").iterdir())
    with pytest.raises(StoreError, match="/nowhere"):
        run(world, model_dir, run__name="nowhere", **changes, store__path="/nowhere")


def test_sft_may_grow_until_rl_begins_and_never_shrinks(world: Path, model_dir: Path) -> None:
    changes = {"run__name": "grows", "train__max_steps": 0}
    run(world, model_dir, **changes, **SFT)
    report = run(world, model_dir, **changes, **{**SFT, "sft__steps": 6})
    assert report.done.sft_step == 6
    straight = run(world, model_dir, run__name="six", train__max_steps=0, **{**SFT, "sft__steps": 6})
    assert weights_of(report.run, "sft-000006") == weights_of(straight.run, "sft-000006")
    with pytest.raises(RunError, match=r"sft\.steps = 6 again, not 5"):
        run(world, model_dir, **changes, **{**SFT, "sft__steps": 5})
    run(world, model_dir, **{**changes, "train__max_steps": 1}, **{**SFT, "sft__steps": 6})
    with pytest.raises(RunError, match=r"sft\.steps = 6 again, not 7"):
        run(world, model_dir, **{**changes, "train__max_steps": 1}, **{**SFT, "sft__steps": 7})
