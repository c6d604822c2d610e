"""A compiled body computes what the plain one does, for lengths that vary, forward and backward."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from run_examples import PROBLEMS, config_of, write_problems, write_store

from trainer.config import GuidanceConfig, TrainConfig
from trainer.method.update import Updater
from trainer.run.run_dir import RunFiles
from trainer.run.setup import assemble
from trainer.student.batches import TrainSequence
from trainer.student.optimizer import make_optimizer
from trainer.student.policy import Policy
from trainer.telemetry.console import TrainReporter


def rows(length: int) -> list[TrainSequence]:
    ids = tuple(5 + i % 90 for i in range(length))
    return [
        TrainSequence(prompt_ids=(2, 40), response_ids=ids[:cut], advantage=sign, is_teacher=False)
        for cut, sign in ((length, 1.0), (length // 2, -1.0))
    ]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_steps_are_the_plain_ones_up_to_float_noise() -> None:
    weights, norms = [], []
    for compiled in (False, True):
        policy = Policy(tiny_model(), tiny_tokenizer(), dtype=torch.float32)
        if compiled:
            policy.compile()
        config = TrainConfig(learning_rate=1e-3)
        optimizer = make_optimizer(policy.model, config)
        updater = Updater(policy, optimizer, config, GuidanceConfig(), max_completion_length=64)
        norms.append([updater.optimizer_step(rows(length)).grad_norm for length in (8, 21, 60)])
        weights.append([parameter.detach() for parameter in policy.model.parameters()])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    for plain, other in zip(*weights, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("switch", [False, True])
def test_the_key_compiles_the_student_of_a_run(switch: bool, tmp_path: Path, model_dir: Path) -> None:
    write_problems(tmp_path / "train.jsonl", PROBLEMS)
    write_store(tmp_path / "traces")
    config = config_of(tmp_path, model_dir, train__compile=switch)
    with ExitStack() as stack:
        policy = assemble(config, RunFiles(tmp_path / "run"), None, TrainReporter(), stack).policy
    assert (type(policy.body).__name__ == "OptimizedModule") is switch
    assert type(policy.causal.base_model).__name__ == "Qwen2Model"  # what samples is as it was
