"""What makes a run small trains all the same, alone and together, and goes on exactly after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_student
from run_examples import run, updater_of
from safetensors.torch import load_file

from trainer.config import StudentConfig, TrainConfig
from trainer.student.batches import TrainSequence, train_batch
from trainer.student.load import load_policy

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

WANTED = TrainSequence(prompt_ids=(2, 40), response_ids=(9, 30, 1), advantage=1.0, is_teacher=False)
UNWANTED = TrainSequence(prompt_ids=(2, 40), response_ids=(12, 13, 14, 1), advantage=-1.0, is_teacher=False)

FULL: dict[str, Any] = {}
LORA = {"use_peft": True, "lora_r": 4}
QLORA = {**LORA, "load_in_4bit": True}
BF16 = {"dtype": "bfloat16"}
CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose layers are of whole 4-bit blocks, and large enough for 8-bit state."""
    changes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    return save_student(tmp_path_factory.mktemp("blocks"), **changes)


@pytest.mark.parametrize(
    ("student", "update"),
    [
        (FULL, {"optim": "adamw_8bit"}),
        (FULL, {"optim": "paged_adamw_8bit"}),
        (FULL | CHECKPOINTED, {}),
        (FULL | BF16 | CHECKPOINTED, {"optim": "paged_adamw_8bit"}),
        (LORA | BF16, {"optim": "adamw_8bit"}),
        (LORA | BF16 | CHECKPOINTED, {}),
        (QLORA, {"optim": "paged_adamw_8bit"}),
        (QLORA | BF16, {}),
        (QLORA | BF16 | CHECKPOINTED, {"optim": "adamw_8bit"}),
    ],
    ids=lambda value: "+".join(str(each) for item in value.items() for each in item) or "plain",
)
def test_each_way_to_save_memory_learns(
    student: dict[str, Any], update: dict[str, Any], blocks: Path
) -> None:
    torch.manual_seed(0)
    policy = load_policy(StudentConfig(model=str(blocks), device="cpu", **student), temperature=1.0)
    config = TrainConfig(learning_rate=3e-3, **update)
    updater = updater_of(policy, config)
    batch = train_batch([WANTED, UNWANTED], pad_id=0, device=policy.device)

    @torch.no_grad()
    def lead() -> float:
        """log-probability of the wanted response over that of the other."""
        wanted, unwanted = policy.logprobs(batch).sum(dim=1).tolist()
        return float(wanted - unwanted)

    trained = [p for p in policy.model.parameters() if p.requires_grad]
    before, weights = lead(), [p.detach().clone() for p in trained]
    for _ in range(8):
        updater.optimizer_step([WANTED, UNWANTED])
    assert all(not old.equal(new) for old, new in zip(weights, trained, strict=True))
    assert {p.dtype for p in trained} == {torch.float32}
    assert lead() > before + 0.5


def final_weights(world: Path, model: Path, name: str, stops: list[int], **changes: Any) -> dict[str, Any]:
    """The last weights of a run that stopped and went on at `stops`."""
    for steps in stops:
        report = run(world, model, run__name=name, train__max_steps=steps, **changes)
    (path,) = (report.run / "checkpoints" / f"step-{stops[-1]:06d}").glob("*model.safetensors")
    return load_file(path)


def test_qlora_with_all_that_saves_memory_resumes_exactly(world: Path, blocks: Path) -> None:
    changes = {
        "student__use_peft": True,
        "student__lora_r": 64,  # 64 x 64: large enough for 8-bit state
        "student__load_in_4bit": True,
        "student__dtype": "bfloat16",
        "student__gradient_checkpointing": True,
        "train__optim": "paged_adamw_8bit",
    }
    straight = final_weights(world, blocks, "qlora", [3], **changes)
    stopped = final_weights(world, blocks, "qlora-stopped", [1, 3], **changes)
    assert straight.keys() == stopped.keys()
    assert all(straight[name].equal(stopped[name]) for name in straight)
    assert all(bool(value.any()) for name, value in straight.items() if "lora_B" in name)
