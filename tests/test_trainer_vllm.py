"""Rollouts by the real vLLM: new weights reach it, it says so when they do not, and whole runs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tied_student
from run_examples import config_of, make_world
from safetensors.torch import load_file, save_file
from vllm_examples import change, forward_logprobs, prompts_of

from precompute.engines import Request, Sampling
from precompute.engines.vllm_engine import VllmEngine
from store.errors import EngineError, TrainingError
from trainer.method.groups import Group
from trainer.sampling.samplers import VllmSampler, load_vllm
from trainer.sampling.sync_check import SyncCheck
from trainer.sampling.weight_sync import Handover
from trainer.student.load import load_policy
from trainer.student.policy import Policy
from trainer.telemetry.console import TrainReporter
from trainer.train import train

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

MAX_LENGTH = 400

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is its embedding, as in most small models: vllm gets no weights for it."""
    return save_tied_student(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def engine(one_thread: None, world: Path, model: Path) -> Iterator[VllmEngine]:
    """One process for all tests here that need no run of their own: it takes whole weights and adapters."""
    config = config_of(world, model, rollout__engine="vllm", student__use_peft=True, student__lora_r=4)
    policy = load_policy(config.student, temperature=1.0)
    handover = Handover(policy, config.student, world)
    engine = load_vllm(config, policy, handover, max_length=MAX_LENGTH)
    yield engine
    engine.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def sampler_of(
    engine: VllmEngine, world: Path, model: Path, stack: ExitStack, **changes: Any
) -> tuple[VllmSampler, Policy]:
    """A student of its own over the common process."""
    config = config_of(world, model, rollout__engine="vllm", **changes)
    policy = load_policy(config.student, temperature=config.rollout.temperature)
    handover = Handover(policy, config.student, world)
    stack.callback(handover.close)
    check = SyncCheck(policy, prompts_of(policy), None)
    adapter_only = config.student.use_peft
    return VllmSampler(engine, handover, check, adapter_only=adapter_only, sleeps=False), policy


@pytest.mark.parametrize("changes", [{}, {"student__use_peft": True, "student__lora_r": 3}])
def test_vllm_computes_with_the_weights_that_the_student_has_now(
    engine: VllmEngine, world: Path, model: Path, stack: ExitStack, changes: dict[str, Any]
) -> None:
    full, _ = sampler_of(engine, world, model, stack)
    full.sync(0)  # the base, whatever was there before
    sampler, policy = sampler_of(engine, world, model, stack, **changes)
    ids = prompts_of(policy)[0]
    seen = []
    for step in range(3):
        sampler.sync(step)
        (logprobs,) = engine.logprobs([ids])["vllm"]
        assert list(logprobs) == pytest.approx(forward_logprobs(policy, ids).tolist(), abs=1e-3)
        seen.append(torch.tensor(logprobs))
        change(policy, 0.05)
    assert (seen[1] - seen[0]).abs().mean() > 0.1
    assert (seen[2] - seen[1]).abs().mean() > 0.1


def test_nothing_is_wrong_with_weights_that_did_not_change(
    engine: VllmEngine, world: Path, model: Path, stack: ExitStack
) -> None:
    sampler, _ = sampler_of(engine, world, model, stack)
    sampler.sync(0)
    sampler.sync(1)


def test_an_adapter_travels_alone_and_whole_weights_do_not_stay(
    engine: VllmEngine, world: Path, model: Path, stack: ExitStack
) -> None:
    full, _ = sampler_of(engine, world, model, stack)
    full.sync(0)
    assert not list(full._handover.folder.glob("[0-9]*"))
    lora, _ = sampler_of(engine, world, model, stack, student__use_peft=True, student__lora_r=4)
    lora.sync(0)
    lora.sync(1)
    (folder,) = lora._handover.folder.glob("[0-9]*")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name for name in tensors)
    assert not list(folder.glob("model*"))


def test_a_4_bit_student_is_drawn_from_as_it_computes(
    engine: VllmEngine, world: Path, model: Path, stack: ExitStack
) -> None:
    pytest.importorskip("bitsandbytes")
    changes: dict[str, Any] = {"student__use_peft": True, "student__lora_r": 4, "student__load_in_4bit": True}
    sampler, policy = sampler_of(engine, world, model, stack, **changes)
    base = sampler._handover.write_base()
    config = json.loads((base / "config.json").read_text())
    assert (config["dtype"], config.get("quantization_config")) == ("float32", None)
    engine.load_weights(base)
    change(policy, 0.05)
    sampler.sync(0)
    ids = prompts_of(policy)[0]
    (logprobs,) = engine.logprobs([ids])["vllm"]
    assert list(logprobs) == pytest.approx(forward_logprobs(policy, ids).tolist(), abs=1e-3)
    # The weights as they were published are others: 4 bits are not nothing.
    full, _ = sampler_of(engine, world, model, stack)
    full.sync(0)
    with pytest.raises(EngineError, match="did not reach vllm"):
        sampler.sync(1)


def test_what_the_old_weights_have_read_is_forgotten(
    engine: VllmEngine, world: Path, model: Path, stack: ExitStack
) -> None:
    sampler, policy = sampler_of(engine, world, model, stack)
    long = tuple(range(5, 85)) * 4  # longer than vllm's blocks, so that its beginning is kept
    request = Request(request_id="long", prompt_ids=long, seed=3)
    drawing = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=8)
    for step in range(2):
        sampler.sync(step)
        (drawn,) = sampler.generate([request], drawing)
        expected = forward_logprobs(policy, [*long, *drawn.token_ids])[len(long) - 1 :]
        assert list(drawn.logprobs) == pytest.approx(expected.tolist(), abs=1e-3)
        change(policy, 0.05)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_come_with_the_logprobs_that_the_trainer_computes(
    engine: VllmEngine, world: Path, model: Path, stack: ExitStack, temperature: float
) -> None:
    sampler, policy = sampler_of(engine, world, model, stack)
    sampler.sync(0)
    drawing = Sampling(temperature=temperature, top_p=1.0, top_k=0, max_tokens=24, logprobs="sampler")
    prompts = prompts_of(policy)
    requests = [Request(request_id=str(n), prompt_ids=tuple(prompts[n % 4]), seed=50 + n) for n in range(8)]
    found = list(sampler.generate(requests, drawing))
    assert len({completion.token_ids for completion in found}) == 8
    for completion in found:
        prompt = prompts[int(completion.request_id) % 4]
        expected = forward_logprobs(policy, [*prompt, *completion.token_ids], temperature)[len(prompt) - 1 :]
        assert list(completion.logprobs) == pytest.approx(expected.tolist(), abs=1e-3)


def test_logprobs_of_another_kind_than_the_process_gives_are_not_given(
    engine: VllmEngine, world: Path, model: Path, stack: ExitStack
) -> None:
    sampler, policy = sampler_of(engine, world, model, stack)
    sampler.sync(0)
    request = Request(request_id="r", prompt_ids=tuple(prompts_of(policy)[0]), seed=1)
    (at_one,) = sampler.generate([request], Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=4))
    assert len(at_one.logprobs) == len(at_one.token_ids)
    (at_half,) = sampler.generate([request], Sampling(temperature=0.5, top_p=1.0, top_k=0, max_tokens=4))
    assert at_half.logprobs == ()


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (0.05, r"did not reach vllm: there .* -\d\.\d+ a token, in the trainer -\d.*sync_tolerance = 0\.005"),
        # Far below the tolerance of 0.005 nats, as a step of 1e-6 is: vllm's values are the same bit by bit.
        (3e-5, r"did not reach vllm: .*the trainer's moved by .* and vllm's not at all"),
    ],
)
def test_a_sync_that_brings_nothing_is_noticed(
    engine: VllmEngine,
    world: Path,
    model: Path,
    stack: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    size: float,
    said: str,
) -> None:
    sampler, policy = sampler_of(engine, world, model, stack)
    sampler.sync(0)
    change(policy, size)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "load_weights", lambda folder: None)
        with pytest.raises(EngineError, match=said):
            sampler.sync(1)
    sampler.sync(1)


def test_weights_that_arrive_broken_are_noticed(
    engine: VllmEngine, world: Path, model: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, _ = sampler_of(engine, world, model, stack)
    write = sampler._handover.write_weights

    def broken(number: int) -> Path:
        folder = write(number)
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.1.mlp.down_proj.weight"
        save_file({**tensors, name: torch.zeros_like(tensors[name])}, folder / "model.safetensors")
        return folder

    with monkeypatch.context() as patch:
        patch.setattr(sampler._handover, "write_weights", broken)
        with pytest.raises(EngineError, match="did not reach vllm"):
            sampler.sync(0)
    sampler.sync(0)


class Killer(TrainReporter):
    """Kills vLLM's process behind step 2, and keeps what was warned of."""

    def stepped(self, row: dict[str, Any], groups: list[Group]) -> None:
        if row["step"] == 2:
            (process,) = vllm_processes() - self.others
            os.kill(process, signal.SIGKILL)

    def __init__(self) -> None:
        super().__init__()
        self.others = vllm_processes()


def vllm_processes() -> set[int]:
    """Children of this process that run vLLM."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            parent = (directory / "stat").read_text().rpartition(")")[2].split()[1]
            command = (directory / "cmdline").read_bytes()
        except OSError:
            continue
        if int(parent) == os.getpid() and b"precompute.engines.vllm_process" in command:
            found.add(int(directory.name))
    return found


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_on_vllms_samples_and_a_killed_vllm_ends_it_in_one_line(
    world: Path, model: Path
) -> None:
    changes: dict[str, Any] = {"run__save_every": 1, "train__max_steps": 3}
    weights_before = set(Path("/dev/shm").glob("ampo-weights-*"))
    reporter = Killer()
    with pytest.raises(TrainingError, match=r"step 3: the vllm process ended .*step-000002") as caught:
        train(
            config_of(world, model, rollout__engine="vllm", run__name="vllm", **changes),
            reporter=reporter,
        )
    assert "\n" not in str(caught.value)
    assert set(Path("/dev/shm").glob("ampo-weights-*")) == weights_before
    assert vllm_processes() <= reporter.others
    rows = metrics_of(world / "runs" / "vllm")
    assert [row["step"] for row in rows] == [1, 2]
    other = train(config_of(world, model, run__name="plain", **changes), reporter=TrainReporter())
    for row, theirs in zip(rows, metrics_of(other.run), strict=False):
        assert row.keys() == theirs.keys()
        assert row["seconds/sync"] > 0
        assert row["sampling/logp_difference"] < 1e-4
        assert row["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("bits", [False, True])
def test_a_run_with_an_adapter_goes_on_from_its_checkpoint(world: Path, model: Path, bits: bool) -> None:
    if bits:
        pytest.importorskip("bitsandbytes")
    changes: dict[str, Any] = {
        "rollout__engine": "vllm",
        "rollout__temperature": 0.8,
        "student__use_peft": True,
        "student__lora_r": 4,
        "student__load_in_4bit": bits,
        "run__name": f"lora-{bits}",
        "run__save_every": 1,
    }
    train(config_of(world, model, train__max_steps=1, **changes), reporter=TrainReporter())
    report = train(config_of(world, model, train__max_steps=3, **changes), reporter=TrainReporter())
    rows = metrics_of(report.run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["sampling/logp_difference"] < 1e-4 for row in rows)


# The last one: it ends the common process.
def test_what_vllm_cannot_do_is_said_in_its_words_and_ends_it(engine: VllmEngine, world: Path) -> None:
    with pytest.raises(EngineError, match=r"vllm cannot load adapter: .*No adapter found for .*nowhere"):
        engine.load_adapter(world / "nowhere", 99)
    assert not vllm_processes()
