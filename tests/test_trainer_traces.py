"""What is kept of traces, and that keeping it changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_examples import PROBLEMS, teacher, trace

from trainer.method.teacher_traces import Recent, TraceTokens
from trainer.student.policy import Policy

TRACE = trace(PROBLEMS[1], "ada", "so \\boxed{2}", teacher("ada"))


@dataclass(frozen=True, slots=True)
class Value:
    token_ids: tuple[int, ...]


@given(asked=st.lists(st.integers(0, 6)), capacity=st.integers(0, 12))
def test_any_capacity_gives_the_same_values_and_is_never_exceeded(asked: list[int], capacity: int) -> None:
    # Key n is a value of n tokens.
    recent: Recent[Value] = Recent(capacity)
    for key in asked:
        value = recent.get(key, lambda key=key: Value(tuple(range(key))))  # type: ignore[misc]
        assert value.token_ids == tuple(range(key))
        assert recent.tokens <= capacity


def test_what_was_asked_for_longest_ago_falls_out_first() -> None:
    made: list[str] = []
    recent: Recent[Value] = Recent(capacity=6)

    def ask(key: str) -> None:
        def make() -> Value:
            made.append(key)
            return Value((1, 2))

        recent.get(key, make)

    for key in "abcab":  # three values of two tokens fill it
        ask(key)
    assert made == ["a", "b", "c"]
    ask("d")  # c falls out
    ask("a")
    ask("b")
    assert made == ["a", "b", "c", "d"]
    ask("c")
    assert made == ["a", "b", "c", "d", "c"]
    assert recent.tokens == 6


def test_one_trace_behind_two_kinds_of_prompt_is_two(policy: Policy) -> None:
    tokens = TraceTokens(policy, "boxed", own_ids=False)
    assert tokens.of(TRACE, opens_think=False).text == "so \\boxed{2}"
    assert tokens.of(TRACE, opens_think=True).text == "</think>\n\nso \\boxed{2}"
    assert tokens.of(TRACE, opens_think=False) is tokens.of(TRACE, opens_think=False)


def test_a_trace_in_the_students_tokens_ends_with_its_eos(policy: Policy) -> None:
    found = TraceTokens(policy, "answer_tags", own_ids=False).of(TRACE, opens_think=False)
    assert policy.tokenizer.decode(found.token_ids) == "so <answer>2</answer><eos>"
    assert policy.tokenizer.decode(found.reasoning_ids) == "so <answer>"


@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>"])
def test_the_eos_stands_there_once_whatever_pads(policy: Policy, pad_token: str) -> None:
    policy.tokenizer.pad_token = pad_token
    found = TraceTokens(policy, "boxed", own_ids=False).of(TRACE, opens_think=False)
    assert found.token_ids.count(policy.tokenizer.eos_token_id) == 1
