"""Problems, teachers and traces for the store's tests, and the child processes that they start."""

from __future__ import annotations

import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

from store.records import Problem, TeacherRecord, Trace
from store.writer import StoreWriter

JUDGE = {"verifiers": {"math-verify": "0.9.0"}}
NOON = datetime(2026, 1, 2, 12, 0, 0, 123456, tzinfo=UTC)


def problem(number: int) -> Problem:
    return Problem(question=f"What is {number} + {number}?", answer=str(2 * number))


def teacher(name: str, **changes: object) -> TeacherRecord:
    fields: dict[str, object] = {
        "name": name,
        "model": f"models/{name}",
        "revision": None,
        "engine": "transformers",
        "engine_version": "5.0",
        "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
        "system_prompt": "Think.",
        "chat_template_kwargs": {"enable_thinking": False},
        "sampling": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 64},
        "tokenizer_fingerprint": "abcd",
    }
    return TeacherRecord(**(fields | changes))  # type: ignore[arg-type]


def trace(number: int, name: str, sample_index: int = 0, **changes: object) -> Trace:
    text = f"{name} says: it is \\boxed{{{2 * number}}}"
    fields: dict[str, object] = {
        "problem_id": problem(number).problem_id,
        "teacher": name,
        "sample_index": sample_index,
        "text": text,
        "answer": str(2 * number),
        "answer_start": text.index("{") + 1,
        "n_tokens": 3,
        "token_ids": (5, 6, 7),
        "logprobs": (-0.5, -0.25, 0.0),
        "finish_reason": "stop",
        "verdict": "match",
        "is_correct": True,
        "seed": 1,
        "generation_fingerprint": teacher(name).generation_fingerprint,
        "created_at": NOON,
    }
    return Trace(**(fields | changes))  # type: ignore[arg-type]


def wrong(number: int, name: str, sample_index: int = 0) -> Trace:
    return trace(number, name, sample_index, verdict="mismatch", is_correct=False, text="no idea")


def make_store(root: Path, *parts: list[Trace], problems: int = 4) -> Path:
    """A store with the parts given, in order."""
    with StoreWriter.open(root, **JUDGE) as writer:
        writer.write_problems([problem(number) for number in range(problems)])
        for part in parts:
            writer.register_teacher(teacher(part[0].teacher))
            writer.append(part)
    return root


def append_and_leave(root: Path, numbers: list[int], name: str) -> None:
    """A child that appends one part."""
    with StoreWriter.open(root, **JUDGE) as writer:
        writer.register_teacher(teacher(name))
        writer.append([trace(number, name) for number in numbers])


def fork_and_be_killed(root: Path) -> None:
    """A child that holds the write lock, forks a worker that outlives it, and is killed."""
    StoreWriter.open(root, **JUDGE)
    told = root.parent / "worker.pid"
    if os.fork() == 0:
        (root.parent / "worker").write_text(str(os.getpid()))
        (root.parent / "worker").rename(told)
        signal.pause()
    while not told.exists():  # until the worker runs, and holds no lock
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
