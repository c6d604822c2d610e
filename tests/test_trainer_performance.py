"""Each second in one phase, rates and utilization by hand, memory that is really held, and the probe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from run_examples import prompt_of

from store.errors import TrainingError
from store.records import Problem
from trainer.method.groups import Group, Sample
from trainer.student.policy import Policy
from trainer.telemetry.performance import (
    Arithmetic,
    PerformanceMeter,
    arithmetic_of,
    peak_flops,
    peak_memory,
    probe_memory,
    sampled_lengths,
    trained_lengths,
)
from trainer.timing import PHASES, StepTimer


def clock_of(*ticks: float) -> Any:
    """A clock that shows these times, one after the other."""
    shown: Iterator[float] = iter(ticks)
    return lambda: next(shown)


def test_a_phase_inside_another_stops_its_clock() -> None:
    timer = StepTimer(clock=clock_of(0.0, 1.0, 4.0, 9.0, 11.0, 20.0))
    with timer("sample"), timer("verify"):  # from 1; from 4 to 9
        pass
    # sample: 1 to 4 and 9 to 11; the whole from 0 to 20.
    assert timer.seconds == dict.fromkeys(PHASES, 0.0) | {"sample": 5.0, "verify": 5.0}
    assert timer.total == 20.0


def test_a_phase_may_be_entered_often_and_one_that_fails_counts() -> None:
    timer = StepTimer(clock=clock_of(0.0, 1.0, 2.0, 5.0, 9.0))
    with timer("score"):
        pass
    with pytest.raises(ZeroDivisionError), timer("score"):
        raise ZeroDivisionError
    assert timer.seconds["score"] == 1.0 + 4.0


def test_each_phase_has_the_peak_of_its_own_time() -> None:
    peaks = iter([9, 1, 5, 7, 6, 2, 3])  # the first one is from before the step
    timer = StepTimer(peak_memory=lambda: next(peaks))
    with timer("sample"), timer("verify"):
        pass
    with timer("sample"):
        pass
    assert timer.peaks == {"other": 2, "sample": 6, "verify": 7}


def test_the_device_is_waited_for_before_the_clock_is_read() -> None:
    events: list[str] = []

    def clock() -> float:
        events.append("clock")
        return 0.0

    with StepTimer(clock=clock, settle=lambda: events.append("settled"))("update"):
        events.append("work")
    assert events == ["clock", "settled", "clock", "work", "settled", "clock"]


def test_operations_of_a_forward_pass_by_hand() -> None:
    arithmetic = Arithmetic(weights=1000, attention_width=8, trains_weights=True)
    # 2 * 1000 * (3 + 5) for the weights; attention: QK and AV over half of T * T, 2 * 8 * (9 + 25).
    assert arithmetic.forward([3, 5]) == 16_000 + 544
    assert arithmetic.update([3, 5]) == 3 * 16_544
    frozen = Arithmetic(weights=1000, attention_width=8, trains_weights=False)
    assert frozen.update([3, 5]) == 2 * 16_544


def test_weights_that_multiply_a_token_are_those_of_linear_layers_the_head_included() -> None:
    policy = Policy(tiny_model(), tiny_tokenizer(), dtype=torch.float32)
    found = arithmetic_of(policy)
    assert found is not None
    vocabulary = policy.causal.config.vocab_size
    # Each of 2 layers: q, k, v, o of 32 x 32, and gate, up, down of 32 x 64.
    assert found.weights == 2 * (4 * 32 * 32 + 3 * 32 * 64) + 32 * vocabulary
    assert found.attention_width == 2 * 1 * 32
    assert found.trains_weights


def test_a_model_with_weights_of_another_kind_has_no_utilization() -> None:
    policy = Policy(tiny_model(), tiny_tokenizer(), dtype=torch.float32)
    policy.causal.experts = torch.nn.Parameter(torch.zeros(8, 32, 64))
    assert arithmetic_of(policy) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(name: str, expected: float | None) -> None:
    assert peak_flops(name) == expected


def sample(length: int, *, trace_id: str | None = None) -> Sample:
    return Sample(
        token_ids=(7,) * length,
        text="",
        finish_reason="stop",
        is_correct=False,
        has_format=False,
        reward=0.0,
        trace_id=trace_id,
    )


GROUPS = [
    Group(
        prompt=prompt_of(Problem(question="1+1", answer="2")),
        samples=(sample(4), sample(6)),
        guidance={1: sample(10, trace_id="t")},
    ),
    Group(prompt=prompt_of(Problem(question="2+2", answer="4"), (2,)), samples=(sample(1), sample(3))),
]
ADVANTAGES = torch.tensor([[-0.5, 0.5], [0.0, 0.0]])


def test_what_was_drawn_and_what_trained_are_counted_apart() -> None:
    # The student drew 4 and 6 tokens behind a prompt of 2, and 1 and 3 behind one of 1.
    assert sampled_lengths(GROUPS) == [6, 8, 2, 4]
    # The second group has no gradient; in the first a trace of 10 tokens trains in the place of 6.
    assert trained_lengths(GROUPS, ADVANTAGES) == [6, 12]


def test_shares_and_rates_by_hand() -> None:
    policy = Policy(tiny_model(), tiny_tokenizer(), dtype=torch.float32)
    # The whole step takes 10 s: sampling 4 with 1 of them waiting for verdicts, the update 5.
    timer = StepTimer(clock=clock_of(0.0, 0.0, 3.0, 4.0, 4.0, 5.0, 10.0, 10.0))
    with timer("sample"), timer("verify"):
        pass
    with timer("update"):
        pass
    found = PerformanceMeter(policy).row(timer, GROUPS, ADVANTAGES, tokens=14)
    assert (found["seconds/sample"], found["seconds/verify"], found["seconds/update"]) == (3.0, 1.0, 5.0)
    assert found["seconds/step"] == 10.0
    assert (found["share/sample"], found["share/verify"], found["share/update"]) == (0.3, 0.1, 0.5)
    assert found["share/score"] == found["seconds/score"] == 0.0
    assert found["tokens_per_second/sampled"] == 14 / 4  # 4 + 6 + 1 + 3 tokens
    assert found["tokens_per_second/trained"] == 14 / 5
    assert found["mfu/sample"] is found["mfu/update"] is None  # the CPU has no known peak
    assert found["memory/peak_mib/score"] is None  # nothing was scored


def test_utilization_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny_model(), tiny_tokenizer(), dtype=torch.float32)
    meter = PerformanceMeter(policy)
    monkeypatch.setattr(
        meter, "_arithmetic", Arithmetic(weights=1000, attention_width=8, trains_weights=True)
    )
    monkeypatch.setattr(meter, "_peak", 1e5)
    timer = StepTimer(clock=clock_of(0.0, 0.0, 2.0, 2.0, 6.0, 6.0))
    with timer("sample"):
        pass
    with timer("update"):
        pass
    found = meter.row(timer, GROUPS, ADVANTAGES, tokens=14)
    # Drawn: 2000 * 20 + 16 * (36 + 64 + 4 + 16) = 41920 in 2 s of 1e5 a second.
    assert found["mfu/sample"] == 0.2096
    # Trained: 3 * (2000 * 18 + 16 * (36 + 144)) = 116640 in 4 s.
    assert found["mfu/update"] == 0.2916


def test_peak_memory_on_the_cpu_is_what_the_process_held() -> None:
    before = peak_memory(torch.device("cpu"))
    assert before > 50 * 2**20  # torch alone is more
    held = torch.ones(before // 4 + 64 * 2**20 // 4)  # float32: 64 MiB more than was ever there
    assert peak_memory(torch.device("cpu")) >= before + 48 * 2**20
    del held
    assert peak_memory(torch.device("cpu")) >= before + 48 * 2**20  # a peak stays


def test_the_probe_changes_nothing_and_names_the_keys_where_memory_is_short(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = torch.optim.AdamW(policy.model.parameters())
    before, generator = {k: v.clone() for k, v in policy.model.state_dict().items()}, torch.get_rng_state()
    shapes: list[torch.Size] = []
    forward = policy.logprobs_and_entropy

    def noted(batch: Any) -> Any:
        shapes.append(batch.input_ids.shape)
        return forward(batch)

    monkeypatch.setattr(policy, "logprobs_and_entropy", noted)
    probe_memory(policy, optimizer, longest=30, max_tokens=100)
    probe_memory(policy, optimizer, longest=30, max_tokens=20)  # a sequence is never cut
    assert shapes == [(3, 30), (1, 30)]
    assert all(value.equal(before[name]) for name, value in policy.model.state_dict().items())
    assert all(weight.grad is None for weight in policy.model.parameters())
    assert torch.get_rng_state().equal(generator)
    assert not optimizer.state
    assert not policy.model.training

    def short(batch: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(policy, "logprobs_and_entropy", short)
    with pytest.raises(TrainingError, match=r"3 x 30 tokens: lower train.max_tokens_per_microbatch = 100 or"):
        probe_memory(policy, optimizer, longest=30, max_tokens=100)
