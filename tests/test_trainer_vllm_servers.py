"""Rollouts by a real vLLM server: whole weights and adapters reach it through a directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from openai_examples import free_port, vllm_server
from run_examples import config_of, make_world
from vllm_examples import change, forward_logprobs, prompts_of

from precompute.engines import Request, Sampling
from store.errors import EngineError
from trainer.config import Config
from trainer.sampling.samplers import Sampler, VllmSampler, make_sampler
from trainer.student.load import load_policy
from trainer.student.policy import Policy
from trainer.telemetry.console import TrainReporter
from trainer.train import train

if find_spec("vllm") is None or find_spec("openai") is None:
    pytest.skip("vllm or openai is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[str]:
    """The server that all tests here share: its start takes the better part of a minute."""
    port = free_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        with vllm_server(
            tmp_path_factory.mktemp("server") / "log.txt",
            port,
            "--enable-lora",
            options={"model": str(model_dir), "max-model-len": "128", "max-lora-rank": "8"},
            environment={"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
        ):
            yield f"http://127.0.0.1:{port}/v1"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def config_at(url: str, world: Path, model: Path, **changes: Any) -> Config:
    return config_of(world, model, rollout__engine="vllm", rollout__base_urls=url.split(), **changes)


def sampler_at(config: Config, world: Path, stack: ExitStack) -> tuple[Sampler, Policy]:
    policy = load_policy(config.student, temperature=config.rollout.temperature)
    return make_sampler(config, policy, prompts_of(policy), world / "run", stack), policy


@pytest.mark.parametrize("changes", [{}, {"student__use_peft": True, "student__lora_r": 3}])
def test_a_server_draws_with_the_weights_that_the_student_has_now(
    url: str, world: Path, model_dir: Path, stack: ExitStack, changes: dict[str, Any]
) -> None:
    sampler_at(config_at(url, world, model_dir), world, stack)[0].sync(0)  # the base, whatever was there
    sampler, policy = sampler_at(config_at(url, world, model_dir, **changes), world, stack)
    prompt = prompts_of(policy)[0]
    drawing = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=16, logprobs="sampler")
    for step in range(3):
        sampler.sync(step)
        request = Request(request_id="r", prompt_ids=tuple(prompt), seed=step)
        (drawn,) = sampler.generate([request], drawing)
        expected = forward_logprobs(policy, [*prompt, *drawn.token_ids])[len(prompt) - 1 :]
        assert list(drawn.logprobs) == pytest.approx(expected.tolist(), abs=1e-3)
        change(policy, 0.05)
    sampler.close()


def test_at_another_temperature_a_server_cannot_tell_the_samplers_logprobs(
    url: str, world: Path, model_dir: Path, stack: ExitStack
) -> None:
    sampler, policy = sampler_at(config_at(url, world, model_dir), world, stack)
    sampler.sync(0)
    request = Request(request_id="r", prompt_ids=tuple(prompts_of(policy)[0]), seed=1)
    cold = Sampling(temperature=0.5, top_p=1.0, top_k=0, max_tokens=4, logprobs="sampler")
    (drawn,) = sampler.generate([request], cold)
    assert drawn.token_ids
    assert drawn.logprobs == ()


def test_a_server_that_was_not_told_is_noticed_and_named(
    url: str, world: Path, model_dir: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, policy = sampler_at(config_at(url, world, model_dir), world, stack)
    assert isinstance(sampler, VllmSampler)
    sampler.sync(0)
    change(policy, 0.05)
    monkeypatch.setattr(sampler._engine, "load_weights", lambda folder: None)
    with pytest.raises(EngineError, match=f"did not reach {url}"):
        sampler.sync(1)


def test_a_server_that_is_gone_ends_the_sync(
    url: str, world: Path, model_dir: Path, stack: ExitStack
) -> None:
    gone = f"http://127.0.0.1:{free_port()}/v1"
    sampler, _ = sampler_at(config_at(f"{url} {gone}", world, model_dir), world, stack)
    with pytest.raises(EngineError, match=f"{gone} does not answer: .*refused"):
        sampler.sync(0)


def test_a_path_that_a_server_does_not_know_says_how_to_start_it(
    url: str, world: Path, model_dir: Path, stack: ExitStack
) -> None:
    sampler, _ = sampler_at(config_at(url, world, model_dir), world, stack)
    assert isinstance(sampler, VllmSampler)
    with pytest.raises(EngineError, match=r"refuses /sesame: 404 .*; open it"):
        sampler._engine._post(url, "/sesame", {}, hint="open it")  # type: ignore[attr-defined]


def test_weights_that_a_server_cannot_read_are_an_error_of_one_line(
    url: str, world: Path, model_dir: Path, stack: ExitStack
) -> None:
    changes: dict[str, Any] = {"student__use_peft": True, "student__lora_r": 3}
    sampler, _ = sampler_at(config_at(url, world, model_dir, **changes), world, stack)
    assert isinstance(sampler, VllmSampler)
    with pytest.raises(EngineError, match="refuses /v1/load_lora_adapter: 404") as caught:
        sampler._engine.load_adapter(world / "nowhere", 1)
    assert "\n" not in str(caught.value)


def test_a_run_trains_on_a_servers_samples(url: str, world: Path, model_dir: Path) -> None:
    torch.set_num_threads(1)
    report = train(
        config_at(url, world, model_dir, run__name="servers", train__max_steps=2), reporter=TrainReporter()
    )
    rows = [json.loads(line) for line in (report.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["sampling/logp_difference"] < 1e-4 for row in rows)
    assert not list(report.run.glob("ampo-weights-*"))
