"""Rollouts by a real vLLM server: full weights and adapters reach it through a directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from openai_examples import free_port, vllm_server
from run_examples import config_of
from vllm_examples import change, forward_logprobs

from precompute.engines import Request, Sampling
from store.errors import EngineError
from trainer.config import Config
from trainer.sampling.samplers import Sampler, VllmSampler, make_sampler
from trainer.sampling.vllm_servers import VllmServers
from trainer.student.load import load_policy
from trainer.student.policy import Policy
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import read_metrics
from trainer.train import train

if find_spec("vllm") is None or find_spec("openai") is None:
    pytest.skip("vllm or openai is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[str]:
    """The server that all tests here share: its start takes the better part of a minute."""
    port = free_port()
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
    longest = len(policy.tokenizer("<user>7+7<assistant>")["input_ids"])
    return make_sampler(config, policy, longest, world / "run", stack), policy


@pytest.mark.parametrize("changes", [{}, {"student__use_peft": True, "student__lora_r": 3}])
def test_servers_sample_with_the_weights_that_the_student_has_now(
    url: str, world: Path, model_dir: Path, stack: ExitStack, changes: dict[str, Any]
) -> None:
    sampler_at(config_at(url, world, model_dir), world, stack)[0].sync()  # the base, whatever was there
    sampler, policy = sampler_at(config_at(url, world, model_dir, **changes), world, stack)
    prompt = policy.tokenizer("<user>7+7<assistant>")["input_ids"]
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=16, logprobs="sampler")
    for step in range(3):
        sampler.sync()
        request = Request(request_id="r", prompt_ids=tuple(prompt), seed=step)
        (sampled,) = sampler.generate([request], sampling)
        expected = forward_logprobs(policy, [*prompt, *sampled.token_ids])[len(prompt) - 1 :]
        assert list(sampled.logprobs) == pytest.approx(expected.tolist(), abs=1e-3)
        change(policy, 0.05)
    # At another temperature a server does not report the sampler's log-probabilities.
    (cold,) = sampler.generate([request], dataclasses.replace(sampling, temperature=0.5))
    assert cold.token_ids
    assert cold.logprobs == ()
    sampler.close()


def test_what_a_server_cannot_do_names_it_in_one_line(
    url: str, world: Path, model_dir: Path, stack: ExitStack
) -> None:
    gone = f"http://127.0.0.1:{free_port()}/v1"
    sampler, _ = sampler_at(config_at(f"{url} {gone}", world, model_dir), world, stack)
    with pytest.raises(EngineError, match=f"{gone} does not answer: .*refused"):
        sampler.sync()
    assert isinstance(sampler, VllmSampler)
    assert isinstance(sampler._engine, VllmServers)
    with pytest.raises(EngineError, match=r"refuses /sesame: 404 .*; open it"):
        sampler._engine._post(url, "/sesame", {}, hint="open it")
    with pytest.raises(EngineError, match="refuses /v1/load_lora_adapter: 404") as caught:
        sampler._engine.load_adapter(world / "nowhere", 1)
    assert "\n" not in str(caught.value)


def test_a_run_trains_on_a_servers_samples(url: str, world: Path, model_dir: Path) -> None:
    config = config_at(url, world, model_dir, run__name="servers", train__max_steps=2)
    report = train(config, reporter=TrainReporter())
    rows = read_metrics(report.run)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["sampling/logp_difference"] < 1e-4 for row in rows)
    assert not list(report.run.glob("*weights*"))
