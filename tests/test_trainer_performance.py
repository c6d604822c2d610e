"""Each second in one phase, shares and rates by hand, memory that is really held, and the probe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from run_examples import prompt_of, sample_of

from store.errors import TrainingError
from store.records import Problem
from trainer.method.groups import Group, Sample
from trainer.run.setup import probe_memory
from trainer.student.policy import Policy
from trainer.telemetry.metrics import PHASES, StepTimer, peak_memory


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
    assert timer.metrics([], 0)["seconds/step"] == 20.0


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
    timer = StepTimer(
        clock=lambda: float(events.append("clock") or 0), peak_memory=lambda: events.append("waited") or 0
    )
    with timer("update"):
        events.append("work")
    assert events == ["waited", "clock", "waited", "clock", "work", "waited", "clock"]


def sample(length: int, **changes: Any) -> Sample:
    return sample_of(token_ids=(7,) * length, **changes)


GROUPS = [
    Group(
        prompt=prompt_of(Problem(question="1+1", answer="2")),
        samples=(sample(4), sample(6)),
        guidance={1: sample(10, trace_id="t")},
    ),
    Group(prompt=prompt_of(Problem(question="2+2", answer="4"), (2,)), samples=(sample(1), sample(3))),
]


def test_shares_and_rates_by_hand() -> None:
    # The whole step takes 10 s: sampling 4 with 1 of them waiting for verdicts, the update 5.
    timer = StepTimer(clock=clock_of(0.0, 0.0, 3.0, 4.0, 4.0, 5.0, 10.0, 10.0))
    with timer("sample"), timer("verify"):
        pass
    with timer("update"):
        pass
    found = timer.metrics(GROUPS, 14)
    assert (found["seconds/sample"], found["seconds/verify"], found["seconds/update"]) == (3.0, 1.0, 5.0)
    assert found["seconds/step"] == 10.0
    assert (found["share/sample"], found["share/verify"], found["share/update"]) == (0.3, 0.1, 0.5)
    assert found["share/score"] == found["seconds/score"] == 0.0
    assert found["tokens_per_second/sampled"] == 14 / 4  # 4 + 6 + 1 + 3 tokens
    assert found["tokens_per_second/trained"] == 14 / 5
    assert found["memory/peak_mib/score"] is None  # nothing was scored


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
    with pytest.raises(TrainingError, match=r"3 x 30 tokens: lower train.max_tokens_per_microbatch or"):
        probe_memory(policy, optimizer, longest=30, max_tokens=100)
