"""The openai engine against a real vLLM server: ids, bounds, retries, servers that go, and the key."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from openai_examples import KEY, MODEL, SERVED, Proxy, free_port, vllm_server
from precompute_examples import PROBLEM_FILE, by_id, forward_logprobs, keys_of, lab_config
from transformers import AutoModelForCausalLM

from precompute.config import PrecomputeConfig, TeacherConfig
from precompute.config_file import load_config, toml_of
from precompute.engines import Completion, Engine, Request, Sampling
from precompute.engines.registry import load_engine, load_tokenizer, prepare_engine
from precompute.problems.problem_files import load_problems
from precompute.problems.prompts import render_prompt
from precompute.run import pipeline
from precompute.run.progress import Reporter
from store.errors import ConfigError, EngineError
from store.reader import TraceStore
from trainer.config import Config
from trainer.eval_model import evaluate_model

if find_spec("vllm") is None or find_spec("openai") is None:
    pytest.skip("vllm or openai is not installed", allow_module_level=True)

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=120)
COUNT = 48
Make = Callable[[], Proxy]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The server that all tests here share: its start takes the better part of a minute."""
    port = free_port()
    with vllm_server(tmp_path_factory.mktemp("server") / "log.txt", port):
        yield port


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)


@pytest.fixture
def proxy(port: int) -> Iterator[Make]:
    made: list[Proxy] = []

    def make() -> Proxy:
        made.append(Proxy(port))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(teacher("http://127.0.0.1:1/v1"))


@pytest.fixture(scope="module")
def requests(tokenizer: Any) -> list[Request]:
    problems = load_problems(PROBLEM_FILE).problems[:COUNT]
    prompts = [render_prompt(tokenizer, p, system_prompt="", chat_template_kwargs={}) for p in problems]
    return [Request(request_id=str(n), prompt_ids=p.ids, seed=n) for n, p in enumerate(prompts)]


def teacher(*urls: str, **changes: Any) -> TeacherConfig:
    return TeacherConfig(
        **{
            "name": "totals",
            "model": MODEL,
            "engine": "openai",
            "system_prompt": "",
            "served_model_name": SERVED,
            "base_urls": urls,
            "api_key_env": "TEACHER_KEY",
            "max_tokens": 120,
            "batch_size": 16,
            "max_retries": 1,
            "request_timeout": 60,
            **changes,
        }
    )


def dump(*urls: str) -> dict[str, Any]:
    return teacher(*urls).model_dump()


def address(port: int, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{port}/v1"


def engine_of(teacher: TeacherConfig, tokenizer: Any) -> Engine:
    return load_engine(teacher, "openai", tokenizer, longest_prompt=40)


@pytest.fixture(scope="module")
def drawn(port: int, tokenizer: Any, requests: list[Request]) -> dict[str, Completion]:
    """Over two names of the one server."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TEACHER_KEY", KEY)
        both = teacher(address(port), address(port, "localhost"))
        return by_id(engine_of(both, tokenizer).generate(requests, SAMPLING))


def test_what_comes_back_is_the_models_own(
    drawn: dict[str, Completion], requests: list[Request], tokenizer: Any
) -> None:
    assert len(drawn) == COUNT
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for request in requests[:16]:
        completion = drawn[request.request_id]
        assert completion.logprobs == pytest.approx(forward_logprobs(model, request, completion), abs=1e-2)
    for completion in drawn.values():
        assert completion.text == tokenizer.decode(list(completion.token_ids), skip_special_tokens=True)
    stopped = [completion for completion in drawn.values() if completion.finish_reason == "stop"]
    assert len(stopped) > COUNT // 2
    assert {completion.token_ids[-1] for completion in stopped} == {tokenizer.eos_token_id}


def test_a_seed_decides_the_sample_and_max_tokens_cuts(
    port: int, drawn: dict[str, Completion], requests: list[Request], tokenizer: Any
) -> None:
    engine = engine_of(teacher(address(port)), tokenizer)
    again = by_id(engine.generate(requests[7:12], SAMPLING))
    assert {i: c.token_ids for i, c in again.items()} == {i: drawn[i].token_ids for i in again}
    first = requests[0]
    others = [Request(request_id=str(n), prompt_ids=first.prompt_ids, seed=n) for n in range(900, 916)]
    assert len({completion.token_ids for completion in engine.generate(others, SAMPLING)}) > 1
    short = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=5)
    for completion in engine.generate(requests[:4], short):
        assert (completion.finish_reason, len(completion.token_ids)) == ("length", 5)
        assert completion.token_ids == drawn[completion.request_id].token_ids[:5]


def test_no_more_than_batch_size_are_under_way(proxy: Make, requests: list[Request], tokenizer: Any) -> None:
    first, second = proxy(), proxy()
    first.delay = second.delay = 0.05
    engine = engine_of(teacher(first.url, second.url, batch_size=6), tokenizer)
    assert len(list(engine.generate(iter(requests), SAMPLING))) == COUNT
    # Spread evenly: three at each, and no more.
    assert (first.most_at_once, second.most_at_once) == (3, 3)
    assert first.calls + second.calls == COUNT


def test_a_server_that_is_busy_or_fails_is_asked_again(
    proxy: Make, drawn: dict[str, Completion], requests: list[Request], tokenizer: Any
) -> None:
    server = proxy()
    engine = engine_of(teacher(server.url, batch_size=1, max_retries=2), tokenizer)
    server.failures = [(429, "slow down"), (500, "oh no")]
    (completion,) = engine.generate(requests[:1], SAMPLING)
    assert completion.token_ids == drawn["0"].token_ids
    assert server.calls == 3


def test_a_server_that_hangs_is_given_up(
    proxy: Make, requests: list[Request], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    slow, quick = proxy(), proxy()
    slow.delay = 30
    engine = engine_of(teacher(slow.url, quick.url, request_timeout=2, max_retries=0), tokenizer)
    assert len(list(engine.generate(requests[:8], SAMPLING))) == 8
    assert caplog.messages == [f"totals: {slow.url} is given up (no answer in time); the other servers go on"]


def test_one_server_that_goes_leaves_the_work_to_the_other(
    proxy: Make,
    drawn: dict[str, Completion],
    requests: list[Request],
    tokenizer: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = proxy(), proxy()
    engine = engine_of(teacher(first.url, second.url), tokenizer)
    first.stop_after = 10
    found = by_id(engine.generate(requests, SAMPLING))
    assert {i: c.token_ids for i, c in found.items()} == {i: c.token_ids for i, c in drawn.items()}
    (message,) = caplog.messages
    assert message.startswith(f"totals: {first.url} is given up (")
    # One that is gone from the start is told as well.
    engine_of(teacher(first.url, second.url), tokenizer)
    assert caplog.messages[1].startswith(f"totals: {first.url} is given up (")


def test_when_the_last_server_goes_what_was_verified_is_kept(proxy: Make, port: int, tmp_path: Path) -> None:
    first, second = proxy(), proxy()
    first.stop_after = second.stop_after = 20
    with pytest.raises(EngineError, match=r"no server is left: .*; what was verified is kept") as caught:
        pipeline.run(lab_config(tmp_path / "traces", dump(first.url, second.url)), limit=64)
    assert first.url in str(caught.value)
    assert second.url in str(caught.value)
    kept = keys_of(tmp_path / "traces")
    assert 0 < len(kept) < 64
    report = pipeline.run(lab_config(tmp_path / "traces", dump(address(port))), limit=64)
    assert report.teachers[0].new_samples == 64 - len(kept)
    # The two runs together drew what one alone would have drawn.
    pipeline.run(lab_config(tmp_path / "other", dump(address(port))), limit=64)
    assert kept.items() <= keys_of(tmp_path / "traces").items()
    assert keys_of(tmp_path / "traces") == keys_of(tmp_path / "other")


def test_the_key_is_written_nowhere(
    port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    config = lab_config(tmp_path / "traces", dump(address(port)))
    report = pipeline.run(config, limit=8)
    assert report.teachers[0].stored.traces == 8
    plan = pipeline.plan(config, limit=8)
    files = [path for path in (tmp_path / "traces").rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in "".join([toml_of(config), repr(config), repr(plan), repr(report), caplog.text])
    assert KEY not in "".join(capfd.readouterr())
    with TraceStore(tmp_path / "traces") as store:
        assert store.teachers()["totals"].engine_version.count(".") == 2


def test_an_answer_that_repeats_the_key_is_told_without_it(
    proxy: Make, requests: list[Request], tokenizer: Any
) -> None:
    server = proxy()
    engine = engine_of(teacher(server.url), tokenizer)
    server.failures = [(400, f"what is Bearer {KEY} to me?\nnothing")]
    (found,) = engine.generate(requests[:1], SAMPLING)
    assert (found.finish_reason, found.error) == (
        "error",
        f"{server.url}: 400 what is Bearer *** to me? nothing",
    )


def test_without_api_key_env_no_key_is_sent(
    proxy: Make, requests: list[Request], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-somebodys")
    server = proxy()
    engine = engine_of(teacher(server.url, api_key_env=None), tokenizer)
    assert len(list(engine.generate(requests[:2], SAMPLING))) == 2
    assert server.keys == {None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env = 'NO_SUCH_KEY': there is no such variable"),
        ({"api_key_env": "WRONG_KEY"}, "401 Unauthorized; the key in WRONG_KEY is not accepted"),
        ({"api_key_env": None}, "401 Unauthorized; it wants a key: name the environment variable"),
        ({"served_model_name": "sums"}, "does not serve 'sums'; served_model_name may be: 'totals'"),
        ({"served_model_name": None}, f"does not serve {MODEL!r}"),
        ({"quantization": "fp8"}, "quantization = 'fp8': the servers at base_urls decide"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_drawn(
    port: int, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("WRONG_KEY", "guess")
    with pytest.raises(EngineError, match="teacher 'totals': ") as caught:
        prepare_engine(teacher(address(port), **changes), "openai")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_server_there_is_one_line_that_names_it() -> None:
    with pytest.raises(EngineError, match=r"no server answers: http://127\.0\.0\.1:1/v1 \(.*refused\)"):
        prepare_engine(teacher("http://127.0.0.1:1/v1"), "openai")


def test_prompts_that_a_server_has_no_room_for_fail_alone(
    port: int, requests: list[Request], tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # 41 + 120 = 161 positions, and the server was started with 160.
    engine = load_engine(teacher(address(port)), "openai", tokenizer, longest_prompt=41)
    assert "max_tokens = 120 need 161 positions and a server has 160; prompts that do not fit" in caplog.text
    long = Request(request_id="long", prompt_ids=(5,) * 41, seed=0)
    found = by_id(engine.generate([long, requests[0]], SAMPLING))
    assert "need 161 positions and a server has 160" in found["long"].error
    assert found["0"].finish_reason == "stop"


def test_of_a_server_without_ids_the_text_is_all_that_is_taken(
    proxy: Make, drawn: dict[str, Completion], requests: list[Request], tokenizer: Any
) -> None:
    def plain(answer: dict[str, Any]) -> dict[str, Any]:
        for model in answer.get("data", []):
            model["owned_by"] = "somebody"
        for choice in answer.get("choices", []):
            # It was not asked for ids or log-probabilities.
            assert choice.pop("token_ids") is None
            assert choice["logprobs"] is None
        return answer

    server = proxy()
    server.rewrite = plain
    found = by_id(engine_of(teacher(server.url), tokenizer).generate(requests[:12], SAMPLING))
    for request_id, completion in found.items():
        theirs = drawn[request_id]
        assert (completion.text, completion.finish_reason) == (theirs.text, theirs.finish_reason)
        assert completion.logprobs == ()
        # The lab's tokens are characters, so that only the EOS behind the text is missing.
        ended = completion.finish_reason == "stop"
        assert completion.token_ids == (theirs.token_ids[:-1] if ended else theirs.token_ids)


def test_a_completion_that_a_server_breaks_off_is_no_sample(
    proxy: Make, requests: list[Request], tokenizer: Any
) -> None:
    def broken(answer: dict[str, Any]) -> dict[str, Any]:
        for choice in answer.get("choices", []):
            choice["finish_reason"] = "abort"
        return answer

    server = proxy()
    server.rewrite = broken
    with pytest.raises(EngineError, match=r"no server is left: .*it broke a completion off"):
        list(engine_of(teacher(server.url), tokenizer).generate(requests[:1], SAMPLING))


def test_left_early_it_waits_for_nothing(proxy: Make, requests: list[Request], tokenizer: Any) -> None:
    server = proxy()
    server.delay, server.quick_calls = 30, 1
    completions = engine_of(teacher(server.url), tokenizer).generate(requests, SAMPLING)
    next(completions)
    started = time.monotonic()
    del completions
    # The others under way would have taken half a minute.
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_urls", '["http://me:sk-12345@127.0.0.1/v1"]'),
        ("base_urls", '["http://127.0.0.1/v1?key=sk-12345"]'),
        ("api_key_env", '"sk-12345"'),
    ],
)
def test_a_key_in_the_config_is_refused_and_not_repeated(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'[[teachers]]\nname = "a"\nmodel = "m"\n{key} = {value}\n')
    with pytest.raises(ConfigError, match=rf"teachers\[0\]\.{key}: ") as caught:
        load_config(PrecomputeConfig, str(path), [])
    assert "sk-12345" not in str(caught.value)


def test_a_model_behind_servers_is_evaluated_like_one_that_is_here(port: int, tmp_path: Path) -> None:
    lines = PROBLEM_FILE.read_text().splitlines()[:8]
    (tmp_path / "few.jsonl").write_text("\n".join(lines) + "\n")
    url = address(port)
    settings = [
        f'student.model="{MODEL}"',
        'student.system_prompt=""',
        f'problems.eval="{tmp_path}/few.jsonl"',
        "rollout.max_completion_length=100",
        "eval.samples=1",
        "eval.k=[1]",
        "eval.temperature=0.0",
        "verify.workers=1",
    ]
    served = [
        "eval.engine=openai",
        f"eval.engine_args.base_urls=['{url}']",
        f"eval.engine_args.served_model_name={SERVED}",
        "eval.engine_args.api_key_env=TEACHER_KEY",
    ]
    theirs, ours = (
        evaluate_model(load_config(Config, None, settings + more), Reporter(), out=tmp_path / out)[0]
        for more, out in ((served, "served"), (["eval.engine=transformers"], "here"))
    )
    assert theirs == ours
    assert theirs.overall.pass_at[1].value > 0
