"""A teacher's trace as the student must write it, in the student's tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from run_examples import PROBLEMS, prompt_of, trace

from precompute.engines.decoding import control_tokens
from store.errors import StoreError
from store.records import AnswerForm, Trace
from trainer.method.teacher_traces import Candidate, TraceReader, in_students_form
from trainer.student.policy import Policy


def trace_of(text: str, answer: str = "2") -> Trace:
    made = trace(PROBLEMS[1], "ada", text if "{" in text else f"{text}{{")
    return replace(made, text=text, answer_start=text.rindex(answer))


def candidate(policy: Policy, form: AnswerForm = "boxed", *, opens_think: bool = False) -> Candidate:
    store: Any = None
    reader = TraceReader(store=store, student=policy, max_length=100)
    prompt = replace(prompt_of(PROBLEMS[1], opens_think=opens_think), answer_form=form)
    return reader.candidate(trace_of("so \\boxed{2}"), prompt)


@pytest.mark.parametrize(
    ("text", "form", "reasoning", "expected"),
    [
        ("so \\boxed{2}.", "boxed", "so \\boxed{", "so \\boxed{2}."),
        ("so <answer>2</answer>", "boxed", "so \\boxed{", "so \\boxed{2}"),
        ("so \\boxed{2}.", "answer_tags", "so <answer>", "so <answer>2</answer>."),
        # A box inside tags is the answer, not an answer in a box in a box.
        ("so <answer>\\boxed{2}</answer>", "boxed", "so \\boxed{", "so \\boxed{2}"),
        # Verified as boxed; a broken tag behind it would hide it from a search in either form.
        ("\\boxed{2}. <answer>", "boxed", "\\boxed{", "\\boxed{2}. <answer>"),
        # Lines begin and end with themselves.
        ("so \\boxed{2}.", "hashes", "so \n#### ", "so \n#### 2\n."),
        ("so\n#### 2", "boxed", "so\n\\boxed{", "so\n\\boxed{2}"),
        ("so\n**Answer:** 2", "answer_tags", "so\n<answer>", "so\n<answer>2</answer>"),
        ("so \\boxed{2}", "answer_line", "so \nAnswer: ", "so \nAnswer: 2"),
    ],
)
def test_the_answers_form_is_mapped(text: str, form: AnswerForm, reasoning: str, expected: str) -> None:
    answer = "\\boxed{2}" if "<answer>\\boxed" in text else "2"
    assert in_students_form(trace_of(text, answer), form, opened=None) == (reasoning, expected)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("so \\boxed{2}", "\n", "</think>\n\nso \\boxed{2}"),
        ("<think>hm</think>so \\boxed{2}", "\n", "hm</think>so \\boxed{2}"),
        ("hm</think>so \\boxed{2}", "\n", "hm</think>so \\boxed{2}"),
        ("<think>\nhm</think>so \\boxed{2}", "\n", "hm</think>so \\boxed{2}"),
        ("<think>\nhm</think>so \\boxed{2}", "", "\nhm</think>so \\boxed{2}"),
        (" \n<think>\n\nhm</think>so \\boxed{2}", "\n", "\nhm</think>so \\boxed{2}"),
        ("hm</think>so \\boxed{2}", None, "<think>\nhm</think>so \\boxed{2}"),
        ("<think>hm</think>so \\boxed{2}", None, "<think>hm</think>so \\boxed{2}"),
    ],
)
def test_thinking_is_mapped_to_what_the_students_prompt_opened(
    text: str, opened: str | None, expected: str
) -> None:
    assert in_students_form(trace_of(text), "boxed", opened=opened)[1] == expected


def test_a_trace_whose_answer_is_not_where_it_says_is_named() -> None:
    made = replace(trace_of("so \\boxed{2}"), answer_start=0)
    with pytest.raises(StoreError, match=made.trace_id):
        in_students_form(made, "boxed", opened=None)


def test_a_trace_in_the_students_tokens_ends_with_its_eos(policy: Policy) -> None:
    found = candidate(policy, "answer_tags")
    assert policy.tokenizer.decode(found.token_ids) == "so <answer>2</answer><eos>"
    assert policy.tokenizer.decode(found.reasoning_ids) == "so <answer>"


@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>"])
def test_the_eos_is_there_once_whatever_pads(policy: Policy, pad_token: str) -> None:
    policy.tokenizer.pad_token = pad_token
    assert candidate(policy).token_ids.count(policy.tokenizer.eos_token_id) == 1


def test_control_tokens_behind_a_trace_are_cut_and_others_keep_it_out(policy: Policy) -> None:
    refused = []
    reader = TraceReader(
        store=cast(Any, None),
        student=policy,
        max_length=100,
        control=control_tokens(policy.tokenizer),
        on_refused=lambda trace, token: refused.append((trace.text, token)),
    )
    texts = [
        "so \\boxed{2}",
        "so \\boxed{2}. <eos>\n<pad><eos> ",
        "so <user>1 \\boxed{2}",
        "\\boxed{2}<eos> so",
    ]
    found = reader.candidates(prompt_of(PROBLEMS[1]), [trace_of(text) for text in texts])
    assert [policy.tokenizer.decode(each.token_ids) for each in found] == [
        "so \\boxed{2}<eos>",
        "so \\boxed{2}.<eos>",
    ]
    assert refused == [(texts[2], "<user>"), (texts[3], "<eos>")]
