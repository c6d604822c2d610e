"""What one GPU does with the trainer; `bench/gpu.sh` runs these parts and others, one after the other.

    python -m bench.gpu card|steps|numbers [--small]

    card      the card, torch, and the TFLOP/s of a large bfloat16 product
    steps     sampling with transformers, rewards and update, by student and optimizer: tokens sampled and
              trained per second, peak memory of each phase, the sampler's log-probabilities against the
              trainer's, and MFU: the update's FLOP/s, recomputation left out, over those of that product
    numbers   log-probabilities, entropies and gradient in bfloat16 against float32

Models are random Qwen2 of the shapes of Qwen2.5-0.5B and 1.5B that never end by themselves, made on the spot;
every second sample earns 1, so every group trains. `--small`: tiny shapes, seconds on a CPU. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench import train_step
from bench.measure import alone, synchronize, ways_table
from bench.train_step import SIZES, Clock, PlainRewarder, Size, model_of, settings
from precompute.config_file import load_config
from store.errors import UserError
from trainer.config import Config, StudentConfig
from trainer.run.run_dir import Position, RunFiles
from trainer.run.setup import Run
from trainer.student.batches import pad
from trainer.student.load import load_policy
from trainer.telemetry.console import TrainReporter
from trainer.train import train_step as take_step

Row = dict[str, Any]
LORA = ["student.use_peft=true", "student.lora_r=64"]
QLORA = [*LORA, "student.load_in_4bit=true"]
CHECKPOINTED = ["student.gradient_checkpointing=true"]
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "all weights, AdamW": ("0.5b", []),
    "all weights, 8-bit AdamW": ("0.5b", ["train.optim=adamw_8bit"]),
    "all weights, paged 8-bit AdamW": ("0.5b", ["train.optim=paged_adamw_8bit"]),
    "all weights, AdamW, checkpointing": ("1.5b", CHECKPOINTED),
    "LoRA": ("1.5b", LORA),
    "QLoRA, paged 8-bit AdamW, checkpointing": (
        "1.5b",
        [*QLORA, *CHECKPOINTED, "train.optim=paged_adamw_8bit"],
    ),
}
"""Name -> (size, settings)."""
RESPONSE = 128
"""Tokens of a response, so that six variants take two minutes."""
STEPS = 2
"""After one that warms up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one process does."""

    variant: str
    size: str
    model: str
    small: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    print(json.dumps({"bench": f"gpu {options.part}", **PARTS[options.part](options.small)}))


def card(small: bool) -> Row:
    found: Row = {name: version(name) for name in ("torch", "transformers")}
    found["cuda"] = torch.version.cuda
    found["card"] = "none"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "memory_mib": properties.total_memory // 2**20}
    found["bf16_tflops"] = round(bf16_flops(small) / 1e12, 3)
    for name, value in found.items():
        print(f"{name:14} {value}")
    return found


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bf16_flops(small: bool) -> float:
    """Returns FLOP/s of the best of ten square products in bfloat16."""
    n = 256 if small else 8192
    a, b = (torch.randn(n, n, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / min(seconds_of(lambda: a @ b) for _ in range(10))


def seconds_of(work: Callable[[], object]) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def steps(small: bool) -> Row:
    found: dict[str, dict[str, Row]] = {}
    failed: dict[str, str] = {}
    for size in dict.fromkeys(size for size, _ in VARIANTS.values()):
        with TemporaryDirectory() as folder:
            model = model_of("small" if small else size, Path(folder))
            for variant in (name for name, (own_size, _) in VARIANTS.items() if own_size == size):
                task = Task(variant=variant, size="small" if small else size, model=model, small=small)
                try:
                    found.setdefault(size, {})[variant] = alone(steps_of, task)
                except (RuntimeError, UserError) as error:  # too little memory, or no bitsandbytes
                    failed[variant] = f"{type(error).__name__}: {error}"
    Console(width=150).print(ways_table("a step", "model", found, FIGURES))
    for variant, reason in failed.items():
        print(f"failed: {variant}: {reason}")
    return {"steps": found, "failed": failed}


def steps_of(task: Task) -> Row:
    """Takes the steps; returns means over those after the first."""
    flops = bf16_flops(task.small)
    own = train_step.Task(way="ampo", size=task.size, reward="coin", steps=STEPS, threads=1, model=task.model)
    rows = []
    with TemporaryDirectory() as folder, ExitStack() as stack:
        response = min(RESPONSE, SIZES[task.size].max_tokens)
        changes = [f"rollout.max_completion_length={response}", *VARIANTS[task.variant][1]]
        config = load_config(Config, "configs/lab.toml", [*settings(own, folder), *changes])
        files = RunFiles(Path(folder) / "run")
        run = Run(config, files, None, TrainReporter(), stack)
        files.start(config, after=Position())
        rewarder: Any = PlainRewarder("coin", Clock(STEPS))
        run.rewarder = rewarder
        for step in range(1, STEPS + 2):
            row, groups = take_step(run, step)
            responses = sum(len(s.token_ids) for group in groups for s in group.samples)
            prompts = sum(len(group.prompt.ids) * len(group.samples) for group in groups)
            forward = forward_flops(SIZES[task.size], prompts + responses, responses)
            needed = forward * (2 if config.student.use_peft else 3)
            row["mfu"] = needed / row["seconds/update"] / flops
            rows.append(row)
    return {name: mean([row.get(key) for row in rows[1:]]) for name, key in METRICS.items()}


def forward_flops(size: Size, tokens: int, targets: int) -> float:
    """Returns the FLOPs of linear layers and head in one pass; attention's are left out."""
    kv = min(2, size.heads) * size.hidden // size.heads
    layer = 2 * size.hidden**2 + 2 * size.hidden * kv + 3 * size.hidden * size.mlp
    return 2.0 * (size.layers * layer * tokens + 151_936 * size.hidden * targets)


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


METRICS = {
    "seconds": "seconds/step",
    "sampled/s": "tokens_per_second/sampled",
    "trained/s": "tokens_per_second/trained",
    "MFU": "mfu",
    "sample MiB": "memory/peak_mib/sample",
    "update MiB": "memory/peak_mib/update",
    "log p off": "sampling/logp_difference",
}
"""Column -> metric of a step."""


def _figure(name: str) -> Callable[[Row], str]:
    return lambda row: "" if row[name] is None else f"{row[name]:,.4g}"


FIGURES = {name: _figure(name) for name in METRICS}


def numbers(small: bool) -> Row:
    """Compares both types on the same weights and sequences."""
    size = "small" if small else "0.5b"
    with TemporaryDirectory() as folder:
        model = model_of(size, Path(folder))
        (p, h, g), (exact_p, exact_h, exact_g) = (values(model, dtype) for dtype in ("bfloat16", "float32"))
    difference = (p - exact_p).abs()
    found = {
        "log p, mean difference": float(difference.mean()),
        "log p, largest difference": float(difference.max()),
        "entropy, mean difference": float((h - exact_h).abs().mean()),
        "gradient, cosine": float(torch.nn.functional.cosine_similarity(g, exact_g, dim=0)),
        "gradient, relative difference": float((g - exact_g).norm() / exact_g.norm()),
    }
    for name, value in found.items():
        print(f"{name:30} {value:.3e}")
    return found


def values(model: str, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probabilities, entropies and gradient, on the CPU."""
    student = StudentConfig.model_validate({"model": model, "dtype": dtype})
    policy = load_policy(student, temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 250, (8, 256), generator=generator).tolist()
    batch = pad(ids, [192] * 8, pad_id=policy.pad_id, device=policy.device)
    logprobs, entropy = policy.logprobs_and_entropy(batch)
    signs = torch.tensor([1.0, -1.0], device=policy.device).repeat(4).unsqueeze(1)
    (logprobs * signs).mean().backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat(list(gradients(policy.model))).double()
    return logprobs.detach().cpu(), entropy.detach().cpu(), gradient


def gradients(model: Any) -> Iterator[Tensor]:
    for weight in model.parameters():
        if weight.grad is not None:
            yield weight.grad.flatten().cpu()


PARTS: dict[str, Callable[[bool], Row]] = {"card": card, "steps": steps, "numbers": numbers}


if __name__ == "__main__":
    main()
