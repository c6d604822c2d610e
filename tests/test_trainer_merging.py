"""`ampo model merge`: what it writes is what was trained, and vLLM serves it as it is."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_student, tiny_model, tiny_tokenizer
from run_examples import make_world, run
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from precompute.config import TeacherConfig
from precompute.engines import Engine, Request, Sampling
from precompute.engines.registry import load_engine, load_tokenizer
from store.errors import EngineError, RunError
from trainer.config import StudentConfig
from trainer.merge import merge
from trainer.run.saved_model import as_saved
from trainer.student.batches import pad
from trainer.student.load import load_policy
from trainer.student.policy import Policy

IDS = [(2, 10, 11, 12, 13, 20, 21, 3, 1), (2, 20, 33, 5, 1)]
LAB = Path(__file__).parents[1] / "lab" / "models" / "student"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_world(tmp_path_factory.mktemp("merging"))
    # bitsandbytes' CPU kernel takes no layer narrower than its blocks of 64.
    save_student(path / "base", hidden_size=64, num_attention_heads=2, num_key_value_heads=2)
    return path


@cache
def trained(world: Path, model: Path, name: str, **changes: Any) -> Path:
    """The checkpoint of one step that moves every weight it trains."""
    rate = 3e-2 if changes else 1e-3
    settings = {"run__name": name, "train__max_steps": 1, "train__learning_rate": rate, **changes}
    done = run(world, model, resume="never", **settings)
    assert done.checkpoint is not None
    return done.checkpoint


def as_trained(checkpoint: Path) -> Policy:
    return load_policy(as_saved(StudentConfig(model=str(checkpoint), device="cpu")), temperature=1.0)


def logprobs(policy: Policy) -> torch.Tensor:
    batch = pad(IDS, [8, 4], pad_id=0, device=torch.device("cpu"))
    with torch.no_grad():
        return policy.logprobs(batch)


def plain(model: Path) -> Policy:
    return load_policy(StudentConfig(model=str(model), device="cpu"), temperature=1.0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("full", {}),
        ("lora", {"student__use_peft": True}),
        ("qlora", {"student__use_peft": True, "student__load_in_4bit": True}),
    ],
)
def test_the_merged_model_has_the_distribution_of_the_trained_one(
    world: Path, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    checkpoint = trained(world, world / "base", name, **changes)
    report = merge(checkpoint, tmp_path / "out")
    ours, theirs = logprobs(as_trained(checkpoint)), logprobs(plain(tmp_path / "out"))
    assert (ours - theirs).abs().max() < 1e-4
    before = logprobs(plain(world / "base"))
    assert (theirs - before).abs().max() > 1e-2  # it has learnt something
    assert (report["adapters"], report["four_bits"]) == (name != "full", name == "qlora")
    assert report["dtype"] == "float32"


def test_an_ordinary_model_directory_is_written_and_rounded_only_on_request(
    world: Path, tmp_path: Path
) -> None:
    checkpoint = trained(world, world / "base", "lora", student__use_peft=True)
    (world / "base" / "preprocessor_config.json").write_text('{"size": 224}')  # of a model that reads images
    merge(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 224}'
    report = merge(checkpoint, tmp_path / "rounded", dtype="bfloat16")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert not [name for name in names if "adapter" in name or name in {"optimizer.pt", "state.json"}]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert "lora" not in " ".join(model.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1]
    rounded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype="auto")
    assert (report["dtype"], rounded.dtype) == ("bfloat16", torch.bfloat16)
    for name, weight in model.state_dict().items():
        assert rounded.state_dict()[name].equal(weight.to(torch.bfloat16)), name


def test_auto_takes_the_type_that_the_first_model_was_stored_in(world: Path, tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "narrow")
    tiny_tokenizer().save_pretrained(tmp_path / "narrow")
    checkpoint = trained(world, tmp_path / "narrow", "narrow")
    assert merge(checkpoint, tmp_path / "out")["dtype"] == "bfloat16"


def test_an_existing_directory_and_a_missing_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="out exists"):
        merge(LAB, tmp_path / "out")
    with pytest.raises(EngineError, match="nothing-here"):
        merge(tmp_path / "nothing-here", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def drawn(engine: Engine, prompts: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], Any]]:
    requests = [Request(request_id=str(n), prompt_ids=ids, seed=n) for n, ids in enumerate(prompts)]
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=24)
    found = {completion.request_id: completion for completion in engine.generate(requests, sampling)}
    return [(ids, found[str(n)]) for n, ids in enumerate(prompts)]


@pytest.mark.slow
def test_vllm_serves_merged_adapters_as_they_were_trained(world: Path, tmp_path: Path) -> None:
    checkpoint = trained(world, LAB, "served", student__use_peft=True)
    merge(checkpoint, tmp_path / "out")
    policy = as_trained(checkpoint)
    before = plain(LAB)
    teacher = TeacherConfig(name="served", model=str(tmp_path / "out"), batch_size=4, max_tokens=32)
    engine = load_engine(teacher, "vllm", load_tokenizer(teacher), longest_prompt=32)
    try:
        answers = drawn(engine, [(5, 10, 11, 12), (5, 20), (5, 30, 31)])
    finally:
        engine.close()
    moved = 0.0
    for prompt, completion in answers:
        ids = (*prompt, *completion.token_ids)
        batch = pad([ids], [len(completion.token_ids)], pad_id=0, device=torch.device("cpu"))
        with torch.no_grad():
            ours = policy.logprobs(batch)[0, len(prompt) :]
            base = before.logprobs(batch)[0, len(prompt) :]
        theirs = torch.tensor(completion.logprobs)
        assert (ours - theirs).abs().max() < 1e-4
        moved = max(moved, float((ours - base).abs().max()))
    assert moved > 1e-2
