"""Samplers before any engine runs: what is refused, what vLLM is told, where weights go."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from processes import environment
from run_examples import config_of
from safetensors.torch import load_file

from store.errors import ConfigError, EngineError
from trainer.sampling import samplers as sampler
from trainer.sampling import weight_sync as handover
from trainer.sampling.samplers import (
    check_sampler,
    make_sampler,
    max_lora_rank,
    vllm_environment,
    vllm_options,
)
from trainer.sampling.sync_check import SyncCheck
from trainer.sampling.weight_sync import Handover, place_for
from trainer.student.policy import Policy

VLLM: dict[str, Any] = {"rollout__engine": "vllm"}
URLS = ["http://127.0.0.1:8000/v1"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout__base_urls": URLS}, r'set engine = "vllm"'),
        (VLLM | {"rollout__served_model_name": "s"}, "served_model_name = 's' .* set base_urls"),
        (VLLM | {"rollout__base_urls": ["gpu1:8000"]}, "is no URL"),
        (VLLM | {"rollout__base_urls": ["http://user:sesame@gpu1/v1"]}, "carries no key"),
        (VLLM | {"rollout__vllm_args__max_num_seqs": 4}, "rollout.batch_size says it"),
        (VLLM | {"rollout__vllm_args__tensor_parallel_size": 2}, "base_urls"),
    ],
)
def test_keys_that_do_not_go_together_are_refused_by_name(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        config_of(tmp_path, tmp_path, **changes)
    assert "sesame" not in str(caught.value)


PROCESS = {"rollout__vllm_sleep": False, "rollout__vllm_args__enforce_eager": True}
SYNC = {"rollout__sync_dir": "here", "rollout__sync_tolerance": 0.1}


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        (PROCESS | SYNC, {"vllm_sleep", "vllm_args", "sync_dir", "sync_tolerance"}),
        (VLLM | PROCESS | SYNC, set()),
        (VLLM | PROCESS | SYNC | {"rollout__base_urls": URLS}, {"vllm_sleep", "vllm_args"}),
        ({"rollout__vllm_sleep": True}, set()),  # as they stand by default
    ],
)
def test_keys_that_nothing_reads_are_known(changes: dict[str, Any], idle: set[str], tmp_path: Path) -> None:
    assert set(config_of(tmp_path, tmp_path, **changes).rollout.idle) == idle


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (VLLM | {"student__use_peft": True, "student__lora_r": 600}, r"student.lora_r = 600 .* 512"),
        (
            VLLM | {"rollout__base_urls": URLS, "student__use_peft": True, "student__load_in_4bit": True},
            "rollout.base_urls are servers of the model as it is",
        ),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_sampler(config_of(tmp_path, tmp_path, **changes))


def test_without_vllm_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("precompute.engines.registry.find_spec", lambda _: None)
    check_sampler(config_of(tmp_path, tmp_path))
    with pytest.raises(EngineError, match=r'pip install "ampo\[vllm'):
        check_sampler(config_of(tmp_path, tmp_path, **VLLM))


@pytest.mark.parametrize(("r", "rank"), [(1, 1), (2, 8), (16, 16), (300, 320), (512, 512)])
def test_the_rank_is_the_smallest_that_vllm_knows_and_the_adapter_fits(
    r: int, rank: int, tmp_path: Path
) -> None:
    student = config_of(tmp_path, tmp_path, student__use_peft=True, student__lora_r=r).student
    assert max_lora_rank(student) == rank


def test_vllm_is_told_what_the_config_says(tmp_path: Path) -> None:
    more = {"rollout__batch_size": 24, "rollout__vllm_args__max_num_batched_tokens": 512}
    options = vllm_options(config_of(tmp_path, tmp_path, **VLLM, **more), torch.bfloat16, None, max_length=99)
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
    assert ("enable_sleep_mode" in options) == torch.cuda.is_available()


def test_the_process_sees_nothing_of_the_launcher() -> None:
    given = {"HOME": "/root", "RANK": "3", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert vllm_environment(torch.device("cpu"), given) == {"HOME": "/root"}


@pytest.mark.parametrize(("visible", "seen"), [(None, "2"), ("4,5,6", "6")])
def test_the_process_sees_the_students_gpu_alone(visible: str | None, seen: str) -> None:
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert vllm_environment(torch.device("cuda", 2), given) == {"CUDA_VISIBLE_DEVICES": seen}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_written_in_the_type_that_computes_and_tied_ones_once(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    narrow = Policy(model, tiny_tokenizer(), dtype=torch.bfloat16)
    place = tmp_path / "new" / "place"
    weights = Handover(narrow, config_of(tmp_path, tmp_path).student, place)
    tensors = load_file(weights.write_weights(1) / "model.safetensors")
    own = model.state_dict()
    assert own.keys() - tensors.keys() == ({"lm_head.weight"} if tied else set())
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    assert all(tensor.equal(own[name].bfloat16()) for name, tensor in tensors.items())
    weights.close()
    assert list(place.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(policy: Policy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = config_of(tmp_path, tmp_path)
    with pytest.raises(EngineError, match=r"cannot be written to .*file/ampo.*rollout.sync_dir"):
        Handover(policy, config.student, tmp_path / "file")


BRINGS_WEIGHTS = """
import sys, time
from pathlib import Path
from precompute.config import load_config
from trainer.config import Config
from trainer.sampling.weight_sync import Handover
from trainer.student.load import load_policy

student = load_config(Config, None, [f"student.model={sys.argv[1]}"]).student
weights = Handover(load_policy(student, temperature=1.0), student, Path(sys.argv[2]))
print(weights.write_weights(1), flush=True)
time.sleep(600)
"""


def test_what_a_killed_trainer_left_is_removed_by_the_next_and_what_a_living_one_brings_stays(
    policy: Policy, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = config_of(tmp_path, tmp_path).student
    mine = Handover(policy, student, tmp_path)
    command = [sys.executable, "-c", BRINGS_WEIGHTS, str(model_dir), str(tmp_path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        brought = Path(other.stdout.readline().strip())
        assert {path.name for path in tmp_path.iterdir()} == {mine.folder.name, brought.parent.name}
        handover.remove_abandoned(tmp_path)
        assert (brought / "model.safetensors").exists()
        other.kill()
    # Its room counts as free when the next asks for a place.
    monkeypatch.setattr(handover, "SHARED_MEMORY", tmp_path)
    place_for(policy, Path("run"))
    assert [path.name for path in tmp_path.iterdir()] == [mine.folder.name]
    mine.close()


def test_shared_memory_is_taken_where_the_weights_fit(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(handover, "SHARED_MEMORY", tmp_path)
    assert place_for(policy, Path("run")) == tmp_path
    monkeypatch.setattr(handover, "SPARE", 2.0**60)
    assert place_for(policy, Path("run")) == Path("run")


def test_the_probe_is_at_temperature_1_and_leaves_the_policys_own(policy: Policy) -> None:
    policy.temperature = 0.5
    prompts = [policy.tokenizer("1+1=2")["input_ids"]]
    check = SyncCheck(policy, prompts, None)
    with torch.no_grad():
        logprobs = policy.model(input_ids=torch.tensor(prompts)).logits[0, :-1].log_softmax(-1)
    right = logprobs.gather(1, torch.tensor(prompts[0][1:])[:, None])[:, 0].tolist()
    check.compare(check.own_logprobs(), {"vllm": [right]})
    assert policy.temperature == 0.5
    with pytest.raises(EngineError, match="did not reach vllm"):
        check.compare(check.own_logprobs(), {"vllm": [[value + 0.006 for value in right]]})
    with pytest.raises(EngineError, match="did not reach vllm"):
        check.compare(check.own_logprobs(), {"vllm": [[float("nan"), *right[1:]]]})


class Sleeper:
    """Stands for vllm on a GPU, for on no other device does it sleep; notes what it is told, in order."""

    version = "0"

    def __init__(self, told: list[str], policy: Policy) -> None:
        self.told, self.policy = told, policy

    def load_weights(self, folder: Path) -> None:
        self.told.append("load")

    def logprobs(self, rows: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        self.told.append("probe")
        ids = torch.tensor(rows)
        with torch.no_grad():
            found = self.policy.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return {"vllm": found.gather(2, ids[:, 1:, None])[..., 0].tolist()}

    def sleep(self, level: int) -> None:
        self.told.append("sleep")

    def wake(self, what: str) -> None:
        self.told.append(f"wake {what}")

    def close(self) -> None:
        pass


def test_vllm_sleeps_whenever_the_student_computes_from_the_first_time_on(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(sampler, "load_vllm", lambda *_, **__: Sleeper(told, policy))
    monkeypatch.setattr(sampler, "_sleeps", lambda _: True)
    own = policy.logprobs
    monkeypatch.setattr(policy, "logprobs", lambda batch: (told.append("student"), own(batch))[1])
    with ExitStack() as stack:
        made = make_sampler(config_of(tmp_path, tmp_path, **VLLM), policy, [(2, 5, 7)], tmp_path, stack)
        made.sync(0)
        made.sleep()
        made.sync(1)
    assert told == ["sleep", "student", "wake weights", "load", "wake kv_cache", "probe"] * 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.005), (torch.bfloat16, 0.1)])
def test_16_bits_are_allowed_more(policy: Policy, dtype: torch.dtype, tolerance: float) -> None:
    narrow = Policy(policy.model, policy.tokenizer, dtype=dtype)
    assert SyncCheck(narrow, [[5, 6]], None).tolerance == tolerance
    assert SyncCheck(narrow, [[5, 6]], 0.5).tolerance == 0.5
