"""Comprehension scores of all failed groups of a step: the trainer's way against the reference's procedure.

    python -m bench.comprehension [--cases lab large] [--lab-problems 64] [--large-problems 4]

The reference (the published code): one problem at a time, its candidates padded to the longest prompt and
the longest response that the run allows, full logits [C, P + R, V], log-softmax and the entropy of every
position, of which the answer's are read. The trainer: `guidance.answer_scores`. Both in float32.

    lab     the lab's student (310,080 parameters, vocabulary 262); chains of 2 to 6 operations, each
            solved in the lab's four styles; P + R = 64 + 448, all positions that the student has
    large   a random Qwen2 of 103 million parameters, vocabulary 151,936; four candidates a problem, prompts
            of 40 to 100 tokens, traces log-normal around 150 tokens (a fifth of R: the longer the limits
            beside the traces, the more the reference pads), answers of 1 to 6; P + R = 256 + 768

Each way has a process of its own, with one thread, for its seconds and another for its memory: the peak of
resident memory (on CUDA: allocated) beyond the loaded model. CPU seconds are told too: what else runs on the
machine moves them little. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import add
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench.measure import RETURNED_AT_ONCE, alone, peak_growth
from lab.problems import draw_chain
from lab.solutions import STYLES
from store.terminal.tables import plain_table
from trainer.config import StudentConfig
from trainer.method.guidance import answer_scores, comprehension_scores
from trainer.student.load import load_policy, load_tokenizer, pick_device
from trainer.student.policy import Policy

STUDENT = "lab/models/student"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and what it has to read."""

    name: str
    problems: int
    max_prompt: int
    """P."""
    max_response: int
    """R."""
    max_tokens: int
    """Of one forward pass of the trainer's."""
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one process does."""

    case: Case
    way: str
    measure: str
    """seconds or memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    seconds: float
    cpu_seconds: float
    """Of the best of the repeats, like the seconds."""
    peak_mib: float
    scores: tuple[float, ...]
    tokens: int
    """Of all candidates, without padding."""


Candidate = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""(prompt, reasoning up to the opening of the answer, gold answer), ids."""
Problems = list[list[Candidate]]
"""Of each problem, its candidates."""


def main() -> None:
    options = parse()
    cases = {
        "lab": Case(
            name="lab",
            problems=options.lab_problems,
            max_prompt=64,
            max_response=448,
            max_tokens=192,
            repeats=3,
        ),
        "large": Case(
            name="large",
            problems=options.large_problems,
            max_prompt=256,
            max_response=768,
            max_tokens=1024,
            repeats=1,
        ),
    }
    found = {name: measure(cases[name]) for name in options.cases}
    console = Console()
    console.print(table(found))
    print(json.dumps({"bench": "comprehension", **{name: summary(ways) for name, ways in found.items()}}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=["lab", "large"], default=["lab", "large"])
    parser.add_argument("--lab-problems", type=int, default=64)
    parser.add_argument("--large-problems", type=int, default=4)
    return parser.parse_args()


def measure(case: Case) -> dict[str, Measured]:
    found = {}
    for way in WAYS:
        timed = alone(run, Task(case=case, way=way, measure="seconds"))
        weighed = alone(run, Task(case=case, way=way, measure="memory"), **RETURNED_AT_ONCE)
        found[way] = replace(timed, peak_mib=weighed.peak_mib)
    return found


def run(task: Task) -> Measured:
    """All candidates' scores, after one problem that warms up."""
    torch.set_num_threads(1)
    policy, problems = MODELS[task.case.name](task.case)
    score, times, scores = WAYS[task.way], [], []
    with torch.no_grad():
        score(policy, problems[:1], task.case)
        with peak_growth() as peak:
            for _ in range(task.case.repeats if task.measure == "seconds" else 1):
                started, cpu = time.perf_counter(), time.process_time()
                scores = score(policy, problems, task.case)
                times.append((time.process_time() - cpu, time.perf_counter() - started))
    tokens = sum(len(ids) for problem in problems for candidate in problem for ids in candidate)
    cpu_seconds, seconds = min(times)
    return Measured(
        seconds=seconds, cpu_seconds=cpu_seconds, peak_mib=peak.mib, scores=tuple(scores), tokens=tokens
    )


def ours(policy: Policy, problems: Problems, case: Case) -> list[float]:
    sequences = [reading(candidate) for problem in problems for candidate in problem]
    return answer_scores(policy, sequences, score="mean_logprob", max_tokens=case.max_tokens)


def reading(candidate: Candidate) -> tuple[tuple[int, ...], int]:
    """Returns the ids, and the number of answer ids at their end."""
    prompt, reasoning, answer = candidate
    return (*prompt, *reasoning, *answer), len(answer)


def reference(policy: Policy, problems: Problems, case: Case) -> list[float]:
    return [score for problem in problems for score in reference_of_one(policy, problem, case)]


def reference_of_one(policy: Policy, problem: Sequence[Candidate], case: Case) -> list[float]:
    """Prompts padded on the left to P, responses on the right to R, as verl lays its batches out."""
    width = case.max_prompt + case.max_response
    ids = torch.full((len(problem), width), policy.pad_id)
    mask, answers = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, reasoning, answer) in enumerate(problem):
        start, end = case.max_prompt - len(prompt), case.max_prompt + len(reasoning) + len(answer)
        ids[row, start:end] = torch.tensor([*prompt, *reasoning, *answer])
        mask[row, start:end] = 1
        answers[row, end - len(answer) : end] = 1
    ids, mask, answers = (tensor.to(policy.device) for tensor in (ids, mask, answers))
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = policy.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    logprobs, _ = logprobs_and_entropy(logits[:, :-1], ids[:, 1:])
    return comprehension_scores(logprobs, answers[:, 1:]).tolist()


def logprobs_and_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T] each, by the formulas of verl, which keep memory low: a row's logsumexp at a time."""
    log_total = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    logprobs = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - log_total
    probabilities = torch.softmax(logits, dim=-1)
    return logprobs, log_total - (probabilities * logits).sum(dim=-1)


WAYS: dict[str, Callable[[Policy, Problems, Case], list[float]]] = {"reference": reference, "ampo": ours}


def lab(case: Case) -> tuple[Policy, Problems]:
    policy = load_policy(StudentConfig(model=STUDENT, dtype="float32"), temperature=1.0)
    rng = Random(0)
    return policy, [lab_candidates(policy, rng) for _ in range(case.problems)]


def lab_candidates(policy: Policy, rng: Random) -> list[Candidate]:
    chain = draw_chain(rng, rng.randint(2, 6))
    turn = [{"role": "user", "content": chain.question}]
    prompt = policy.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    reasonings = [style(chain, add).rpartition("{")[0] + "{" for style in STYLES.values()]
    texts = [(prompt, reasoning, str(chain.answer)) for reasoning in reasonings]
    return [(encode(policy, a), encode(policy, b), encode(policy, c)) for a, b, c in texts]


def encode(policy: Policy, text: str) -> tuple[int, ...]:
    return tuple(policy.tokenizer(text, add_special_tokens=False)["input_ids"])


def large(case: Case) -> tuple[Policy, Problems]:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    model: Any = Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]
    rng = Random(0)
    tokenizer = load_tokenizer(StudentConfig(model=STUDENT))
    policy = Policy(model.eval().to(pick_device("auto")), tokenizer, dtype=torch.float32)
    return policy, [large_candidates(rng, case) for _ in range(case.problems)]


def large_candidates(rng: Random, case: Case) -> list[Candidate]:
    prompt, answer = random_ids(rng, rng.randint(40, 100)), random_ids(rng, rng.randint(1, 6))
    lengths = [min(int(rng.lognormvariate(5.0, 0.6)), case.max_response - len(answer)) for _ in range(4)]
    return [(prompt, random_ids(rng, length), answer) for length in lengths]


def random_ids(rng: Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(10, 151_000) for _ in range(count))


MODELS: dict[str, Callable[[Case], tuple[Policy, Problems]]] = {"lab": lab, "large": large}


def table(found: dict[str, dict[str, Measured]]) -> Table:
    drawn = plain_table("comprehension scores, float32, one thread")
    drawn.add_column("model", no_wrap=True)
    drawn.add_column("way", no_wrap=True)
    for name in ("candidates", "tokens", "seconds", "ratio", "CPU s", "CPU ratio", "peak MiB", "of peak"):
        drawn.add_column(name, justify="right")
    for case, ways in found.items():
        first = ways["reference"]
        for name, way in ways.items():
            drawn.add_row(
                case,
                name,
                f"{len(way.scores):,}",
                f"{way.tokens:,}",
                f"{way.seconds:.3f}",
                f"{first.seconds / way.seconds:.1f}",
                f"{way.cpu_seconds:.3f}",
                f"{first.cpu_seconds / way.cpu_seconds:.1f}",
                f"{way.peak_mib:,.1f}",
                f"{way.peak_mib / first.peak_mib:.3f}",
            )
    return drawn


def summary(ways: dict[str, Measured]) -> dict[str, float]:
    first, own = ways["reference"], ways["ampo"]
    return {
        "candidates": len(own.scores),
        "tokens": own.tokens,
        "reference_s": round(first.seconds, 4),
        "ampo_s": round(own.seconds, 4),
        "ratio": round(first.seconds / own.seconds, 2),
        "cpu_ratio": round(first.cpu_seconds / own.cpu_seconds, 2),
        "reference_mib": round(first.peak_mib, 1),
        "ampo_mib": round(own.peak_mib, 1),
        "share_of_peak": round(own.peak_mib / first.peak_mib, 4),
        "largest_difference": max(abs(a - b) for a, b in zip(first.scores, own.scores, strict=True)),
    }


if __name__ == "__main__":
    main()
