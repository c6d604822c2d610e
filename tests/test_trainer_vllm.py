"""Rollouts by the real vLLM: it samples with the student's newest weights, and whole runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import save_tied_student
from proc_examples import children_of
from run_examples import config_of, run
from safetensors.torch import load_file
from vllm_examples import change, forward_logprobs

from precompute.engines import Request, Sampling
from precompute.engines.vllm_engine import VllmEngine
from precompute.verify.verifier import Verdict
from store.errors import EngineError, TrainingError
from store.reader import TraceStore
from store.records import Problem
from trainer.config import Config
from trainer.method.groups import Group, Sample
from trainer.parallel.world import World
from trainer.sampling import samplers
from trainer.sampling.samplers import VllmSampler, load_vllm
from trainer.student.load import load_policy
from trainer.student.policy import Policy
from trainer.telemetry.console import TrainReporter
from trainer.telemetry.metrics import read_metrics
from trainer.train import train

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

MAX_LENGTH = 400
LONG = tuple(range(5, 85)) * 4
"""A prompt longer than vLLM's blocks, so that it caches the beginning."""
LORA: dict[str, Any] = {"student__use_peft": True, "student__lora_r": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is its embedding, as in most small models: vllm gets no weights for it."""
    return save_tied_student(tmp_path_factory.mktemp("tied"))


def start(world: Path, model: Path) -> VllmEngine:
    config = config_of(world, model, rollout__engine="vllm", **LORA)
    engine = load_vllm(config, load_policy(config.student, temperature=1.0), max_length=MAX_LENGTH)
    assert isinstance(engine, VllmEngine)
    return engine


@pytest.fixture(scope="module")
def engine(world: Path, model: Path) -> Iterator[VllmEngine]:
    """One process for all tests here: it takes full weights and adapters."""
    engine = start(world, model)
    yield engine
    engine.close()


def sampler_of(
    engine: VllmEngine, world: Path, model: Path, **changes: Any
) -> tuple[VllmSampler, Path, Policy]:
    """A student of its own over the common process."""
    config = config_of(world, model, rollout__engine="vllm", **changes)
    policy = load_policy(config.student, temperature=config.rollout.temperature)
    folder = world / "weights"
    return VllmSampler(engine, policy, config, folder), folder, policy


@pytest.mark.parametrize(
    "changes",
    [{"rollout__temperature": 0.6}, LORA, LORA | {"student__load_in_4bit": True}],
    ids=["full", "lora", "qlora"],
)
def test_vllm_samples_with_the_weights_that_the_student_has_now(
    engine: VllmEngine, world: Path, model: Path, changes: dict[str, Any]
) -> None:
    if "student__load_in_4bit" in changes:
        pytest.importorskip("bitsandbytes")
    sampler_of(engine, world, model)[0].sync()  # the base, whatever the test before left
    sampler, folder, policy = sampler_of(engine, world, model, **changes)
    prompts = [LONG, *(tuple(policy.tokenizer(f"<user>{n}+{n}")["input_ids"]) for n in (7, 8, 9))]
    sampling = Sampling(temperature=policy.temperature, top_p=1.0, top_k=0, max_tokens=16, logprobs="sampler")
    for step in range(3):
        sampler.sync()
        requests = [Request(request_id=str(n), prompt_ids=prompts[n % 4], seed=50 + n) for n in range(8)]
        found = list(sampler.generate(requests, sampling))
        assert len({(int(each.request_id) % 4, each.token_ids) for each in found}) == 8
        for each in found:
            prompt = prompts[int(each.request_id) % 4]
            ids = [*prompt, *each.token_ids]
            expected = forward_logprobs(policy, ids, policy.temperature)[len(prompt) - 1 :]
            assert list(each.logprobs) == pytest.approx(expected.tolist(), abs=1e-3), step
        change(policy, 0.05)
    if "student__use_peft" in changes:
        assert not list(folder.glob("model*"))
        assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_logprobs_of_another_kind_than_the_process_gives_are_not_given(
    engine: VllmEngine, world: Path, model: Path
) -> None:
    sampler, _, policy = sampler_of(engine, world, model)
    sampler.sync()
    request = Request(request_id="r", prompt_ids=tuple(policy.tokenizer("7")["input_ids"]), seed=1)
    (at_one,) = sampler.generate([request], Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4))
    assert len(at_one.logprobs) == len(at_one.token_ids)
    (at_half,) = sampler.generate([request], Sampling(temperature=0.5, top_p=1.0, top_k=0, max_tokens=4))
    assert at_half.logprobs == ()


def vllm_processes() -> set[int]:
    """Children of this process that run vLLM."""
    found = children_of(os.getpid()).items()
    return {pid for pid, (_, command) in found if b"precompute.engines.vllm_process" in command}


class Killer(TrainReporter):
    """Kills vLLM's process after step 2."""

    def stepped(self, row: dict[str, Any], groups: list[Group], steps: int) -> None:
        if row["step"] == 2:
            (process,) = vllm_processes()
            os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_with_an_adapter_goes_on_from_its_checkpoint(world: Path, model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    changes = LORA | {
        "rollout__engine": "vllm",
        "rollout__temperature": 0.8,
        "student__load_in_4bit": True,
        "run__name": "lora",
        "run__save_every": 1,
    }
    run(world, model, train__max_steps=1, **changes)
    report = run(world, model, train__max_steps=3, **changes)
    rows = read_metrics(report.run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    # Another run trains its adapters on; vLLM begins with their base.
    assert report.checkpoint is not None
    further = run(world, report.checkpoint, **(changes | {"run__name": "on"}), train__max_steps=1)
    rows += read_metrics(further.run)
    assert all(row["sampling/logp_difference"] < 1e-4 for row in rows)


@pytest.mark.slow
def test_what_vllm_cannot_do_is_reported_in_its_words_and_ends_it(world: Path, model: Path) -> None:
    engine, others = start(world, model), vllm_processes()
    with pytest.raises(EngineError, match=r"vllm cannot load adapter: .*No adapter found for .*nowhere"):
        engine.load_adapter(world / "nowhere", 99)
    assert len(vllm_processes()) == len(others) - 1


def distinct(problem: Problem, completion: Sample, verdict: Verdict | None) -> float:
    """A reward: number of different letters."""
    return float(len(set(completion.text)))


@pytest.mark.slow
def test_vllm_samples_what_follows_a_prefix(world: Path, model: Path) -> None:
    changes: dict[str, Any] = {
        "guidance__insert": "prefix",
        "guidance__place": "instead",
        "guidance__share": (0.5,),
        "rewards__test_trainer_vllm:distinct": 1.0,  # groups that all fail have a gradient
        "rollout__max_prompt_length": 200,
    }
    report = run(world, model, rollout__engine="vllm", run__name="prefix", train__max_steps=1, **changes)
    (row,) = read_metrics(report.run)
    assert row["sampling/logp_difference"] < 1e-4  # the trainer computes the same behind the same prefix
    (rollouts,) = (report.run / "rollouts").glob("*.parquet")
    samples = [row for row in pq.read_table(rollouts).to_pylist() if row["trace_id"]]
    assert samples
    with TraceStore(world / "traces") as store:
        # The test tokenizer has no token for a space.
        texts = {trace.trace_id: trace.text.replace(" ", "") for trace in store.traces()}
    for sample in samples:
        whole = texts[sample["trace_id"]]
        assert sample["text"].startswith(whole[: len(whole) // 4])


# The last one: it kills the common process.
def test_a_run_trains_on_vllms_samples_and_a_killed_vllm_ends_it_in_one_line(
    engine: VllmEngine, world: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def common(config: Config, policy: Policy, world: World, *, max_length: int) -> VllmEngine:
        assert max_length <= MAX_LENGTH
        return engine

    monkeypatch.setattr(samplers, "load_vllm", common)
    changes: dict[str, Any] = {"run__save_every": 1, "train__max_steps": 3}
    with pytest.raises(TrainingError, match=r"step 3: the vllm process ended .*step-000002") as caught:
        train(
            config_of(world, model, rollout__engine="vllm", run__name="vllm", **changes),
            reporter=Killer(),
        )
    assert "\n" not in str(caught.value)
    assert not vllm_processes()
    folder = world / "runs" / "vllm"
    assert not list(folder.glob("*weights*"))
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2]
    other = run(world, model, run__name="plain", **changes)
    for row, theirs in zip(rows, read_metrics(other.run), strict=False):
        assert row.keys() == theirs.keys()
        assert row["seconds/sync"] > 0
        assert row["sampling/logp_difference"] < 1e-4
        assert row["grad_norm"] > 0
