"""Samplers before any engine runs: what is refused, vLLM's arguments, weights in their folder."""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from run_examples import config_of
from safetensors.torch import load_file

from precompute.engines.transformers_engine import TransformersEngine
from store.errors import ConfigError, EngineError, TrainingError
from trainer.config import RolloutConfig
from trainer.sampling import samplers
from trainer.sampling.samplers import (
    check_sampler,
    check_sampler_weights,
    make_sampler,
    sampler_warning,
    vllm_environment,
    vllm_options,
)
from trainer.sampling.weight_sync import write_weights
from trainer.student.policy import Policy
from trainer.telemetry.console import TrainReporter
from trainer.train import train

VLLM: dict[str, Any] = {"rollout__engine": "vllm"}
URLS = ["http://127.0.0.1:8000/v1"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout__base_urls": URLS}, r'set engine = "vllm"'),
        (VLLM | {"rollout__base_urls": ["gpu1:8000"]}, "is not a URL"),
        (VLLM | {"rollout__base_urls": ["http://user:sesame@gpu1/v1"]}, "carries no key"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_by_name(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        config_of(tmp_path, tmp_path, **changes)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"rollout__top_p": 0.9}, "the ratio is biased"),
        (VLLM | {"rollout__base_urls": URLS, "rollout__temperature": 0.7}, "is_cap has no effect"),
    ],
)
def test_what_biases_training_is_warned_of(changes: dict[str, Any], warning: str, tmp_path: Path) -> None:
    found = sampler_warning(config_of(tmp_path, tmp_path, **changes).rollout)
    assert warning in str(found)


def test_servers_of_the_16_bit_model_are_refused_for_a_4_bit_student(tmp_path: Path) -> None:
    four_bits = {"student__use_peft": True, "student__load_in_4bit": True}
    with pytest.raises(ConfigError, match="servers of the 16-bit model"):
        check_sampler(config_of(tmp_path, tmp_path, **VLLM, **four_bits, rollout__base_urls=URLS))


def test_vllm_is_told_what_the_config_says(tmp_path: Path) -> None:
    more = {"rollout__batch_size": 24, "rollout__vllm_args__max_num_batched_tokens": 512}
    lora = {"student__use_peft": True, "student__lora_r": 300}
    options = vllm_options(config_of(tmp_path, tmp_path, **VLLM, **more), torch.bfloat16, max_length=99)
    expected = {
        "model": str(tmp_path),
        "dtype": "bfloat16",
        "max_num_seqs": 24,
        "max_model_len": 99,
        "max_num_batched_tokens": 512,
        "logprobs_mode": "processed_logprobs",
    }
    assert options.items() >= expected.items()
    assert "enable_lora" not in options
    adapted = vllm_options(config_of(tmp_path, tmp_path, **VLLM, **lora), torch.bfloat16, max_length=99)
    assert adapted["max_lora_rank"] == 320  # the smallest that vllm knows and 300 fits into
    assert options["enable_sleep_mode"] == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("device", "given", "seen"),
    [
        ("cpu", {"HOME": "/root", "RANK": "3", "TORCHELASTIC_RUN_ID": "x"}, {"HOME": "/root"}),
        ("cuda:2", {}, {"CUDA_VISIBLE_DEVICES": "2"}),
        ("cuda:2", {"CUDA_VISIBLE_DEVICES": "4,5,6"}, {"CUDA_VISIBLE_DEVICES": "6"}),
    ],
)
def test_vllms_process_sees_the_students_gpu_alone_and_nothing_of_torchrun(
    device: str, given: dict[str, str], seen: dict[str, str]
) -> None:
    assert vllm_environment(torch.device(device), given) == seen


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_written_in_the_type_that_computes_and_tied_ones_once(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    policy, folder = Policy(model, tiny_tokenizer(), dtype=torch.bfloat16), tmp_path / "new" / "weights"
    folder.mkdir(parents=True)
    (folder / "of-a-killed-run.safetensors").write_text("")
    write_weights(policy, folder)
    (file,) = folder.glob("*.safetensors")
    tensors, own = load_file(file), model.state_dict()
    assert own.keys() - tensors.keys() == ({"lm_head.weight"} if tied else set())
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert all(tensor.equal(own[name].bfloat16()) for name, tensor in tensors.items())


def test_a_folder_that_cannot_be_written_is_named(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"cannot be written to .*file/weights.*rollout.sync_dir"):
        write_weights(policy, tmp_path / "file" / "weights")


class ModelCopy(TransformersEngine):
    """Stands in for vLLM: samples with a copy of the student, and notes its calls in order."""

    def __init__(self, policy: Policy, calls: list[str]) -> None:
        self.copy = copy.deepcopy(policy.model)
        super().__init__(self.copy, policy.tokenizer, batch_size=16)
        self.calls = calls

    def load_weights(self, folder: Path) -> None:
        self.calls.append("load")
        self.copy.load_state_dict(load_file(folder / "model.safetensors"))

    def load_adapter(self, folder: Path, number: int) -> None:
        raise NotImplementedError

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake(self, *what: str) -> None:
        self.calls.append(f"wake {what[0]}")


class StaleCopy(ModelCopy):
    """Keeps the weights that it began with."""

    def load_weights(self, folder: Path) -> None:
        self.calls.append("load")


@pytest.mark.parametrize("engine", [ModelCopy, StaleCopy])
def test_a_sampler_with_old_weights_stops_the_run(
    engine: type[ModelCopy], world: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(samplers, "resolve_engine", lambda name: name)
    monkeypatch.setattr(samplers, "load_vllm", lambda config, policy, world, **_: engine(policy, calls))
    more = {"run__name": engine.__name__, "train__learning_rate": 1e-2, "run__save_every": 1}
    config = config_of(world, model_dir, **VLLM, **more)
    run = world / "runs" / engine.__name__
    if engine is StaleCopy:
        message = r"^step 2: vllm did not .* by \d.* on average, .*sync_tolerance = 0.005; .*step-000001"
        with pytest.raises(TrainingError, match=message):
            train(config, reporter=TrainReporter())
    else:
        train(config, reporter=TrainReporter())
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert all(row["sampling/logp_difference"] < 1e-4 for row in rows)
        assert calls == ["load"] * 5  # before the first step, and after each of four
    assert not list(run.glob("*weights*"))


@pytest.mark.parametrize(
    ("changes", "dtype", "difference", "stops"),
    [
        ({}, torch.float32, 0.0051, True),
        ({}, torch.float32, 0.0049, False),
        ({}, torch.bfloat16, 0.09, False),
        ({}, torch.bfloat16, 0.11, True),
        ({}, torch.bfloat16, float("nan"), True),
        ({"sync_tolerance": 0.3}, torch.float32, 0.2, False),
        ({"top_p": 0.9}, torch.float32, 0.1, False),
        ({}, torch.float32, None, False),
    ],
)
def test_log_probabilities_may_differ_by_the_tolerance(
    changes: dict[str, Any], dtype: torch.dtype, difference: float | None, stops: bool
) -> None:
    rollout = RolloutConfig(engine="vllm", **changes)
    with pytest.raises(EngineError) if stops else ExitStack():
        check_sampler_weights(rollout, dtype, difference)


def test_vllm_sleeps_from_the_beginning_and_while_weights_are_written(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(samplers, "load_vllm", lambda config, policy, world, **_: ModelCopy(policy, calls))
    monkeypatch.setattr(samplers, "has_sleep_mode", lambda _: True)
    monkeypatch.setattr(
        samplers, "write_weights", lambda *args: (calls.append("write"), write_weights(*args))
    )
    with ExitStack() as stack:
        made = make_sampler(config_of(tmp_path, tmp_path, **VLLM), policy, 3, tmp_path, stack)
        made.sync()
        made.sync()  # awake already
        made.sleep()
        made.sync()
    woken = ["sleep 2", "write", "wake weights", "load", "wake kv_cache"]
    assert calls == [*woken, "write", "load", *woken]
