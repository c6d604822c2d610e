"""A full training step (sample, reward, update) against TRL's GRPOTrainer: tokens per second and peak memory.

    python -m bench.train_step [--size lab|tiny|0.5b|1.5b] [--steps 8] [--rewards coin match] [--threads 1]

The same model, prompts, group size, maximal lengths, reward function, optimizer (AdamW) and dtype, no vLLM,
no teachers, each way in a process of its own; two steps warm up. TRL runs as it is, with
micro-batches of a quarter of the step, and on CUDA with transformers' continuous batching, which TRL cannot
give the pages that it needs on a CPU (and which is the slowest way there: bench.rollouts); gradient
checkpointing is off for all. Seconds are from the end of the warm-up to the end of the last step, memory is
the peak of resident memory (on CUDA: allocated) beyond what is there between steps, in a process of its own.

    coin    every second sample earns 1, so every group trains: nothing is saved by skipping dead groups
    match   1 for the right answer, as in real life: the lab's student answers most problems all right or all
            wrong, and groups without a difference need no update

    lab     the lab's student, float32, 16 problems x 8 samples of at most 160 tokens
    tiny    a random Qwen2 of four layers that never ends by itself: 4 problems x 8 samples of 64 tokens
    0.5b    a random Qwen2 with the shape of Qwen2.5-0.5B, likewise: 8 problems x 8 samples of 512 tokens, in
            bfloat16 over float32 weights; wants a GPU
    1.5b    that of Qwen2.5-1.5B, 256 tokens

TRL comes with `pip install -e ".[bench]"`; without it, ampo is alone. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from bench.measure import RETURNED_AT_ONCE, Peak, alone, peak_growth, ways_table
from precompute.config_file import load_config
from trainer.config import Config
from trainer.method.groups import Prompt, Sample
from trainer.run.run_dir import Position, RunFiles
from trainer.run.setup import Run
from trainer.telemetry.console import TrainReporter
from trainer.train import train_step

STUDENT = "lab/models/student"
PROBLEMS = "lab/problems/train.jsonl"
TRL = find_spec("trl") is not None
WARM_UP = 2
LEARNING_RATE = 1e-6
"""Small, so that what is measured stays the model that was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model and its step."""

    problems: int
    samples: int
    max_tokens: int
    layers: int = 0
    """Of a random model; 0: the lab's student."""
    hidden: int = 0
    mlp: int = 0
    heads: int = 1
    bf16: bool = False


SIZES = {
    "lab": Size(problems=16, samples=8, max_tokens=160),
    "small": Size(problems=2, samples=2, max_tokens=8, layers=2, hidden=64, mlp=128),
    "tiny": Size(problems=4, samples=8, max_tokens=64, layers=4, hidden=128, mlp=694, heads=2),
    "0.5b": Size(problems=8, samples=8, max_tokens=512, layers=24, hidden=896, mlp=4864, heads=14, bf16=True),
    "1.5b": Size(
        problems=8, samples=8, max_tokens=256, layers=28, hidden=1536, mlp=8960, heads=12, bf16=True
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one process does."""

    way: str
    size: str
    reward: str
    steps: int
    threads: int
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One way over its steps."""

    seconds: float
    cpu_seconds: float
    tokens: int
    """Completion tokens."""
    peak_mib: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def main() -> None:
    options = parse()
    with TemporaryDirectory() as folder:
        model = model_of(options.size, Path(folder))
        found = {reward: measure(options, reward, model) for reward in options.rewards}
    Console().print(ways_table("a full training step", "reward", found, FIGURES))
    versions = {name: version(name) for name in ("trl", "transformers", "torch") if find_spec(name)}
    rows = {reward: {way: summary(row) for way, row in ways.items()} for reward, ways in found.items()}
    shares = {reward: ratios(ways) for reward, ways in found.items() if len(ways) > 1}
    print(json.dumps({"bench": "train_step", "size": options.size, **versions, **rows, "ratios": shares}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="lab")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rewards", nargs="+", choices=["coin", "match"], default=["coin", "match"])
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=list(WAYS),
        default=[way for way in WAYS if (cuda or "continuous" not in way) and (way == "ampo" or TRL)],
    )
    return parser.parse_args()


def measure(options: argparse.Namespace, reward: str, model: str) -> dict[str, Measured]:
    found = {}
    for way in options.ways:
        task = Task(
            way=way,
            size=options.size,
            reward=reward,
            steps=options.steps,
            threads=options.threads,
            model=model,
        )
        timed = alone(run, task)
        weighed = timed if torch.cuda.is_available() else alone(run, task, **RETURNED_AT_ONCE)
        found[way] = replace(timed, peak_mib=weighed.peak_mib)
    return found


def run(task: Task) -> Measured:
    torch.set_num_threads(task.threads)
    return WAYS[task.way](task)


def model_of(size: str, folder: Path) -> str:
    """The directory of the model: the lab's student, or a random one that no end token ends."""
    shape = SIZES[size]
    if not shape.layers:
        return STUDENT
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=min(2, shape.heads),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(STUDENT).save_pretrained(folder)
    return str(folder)


def reward_of(reward: str, text: str, gold: str, index: int) -> float:
    """`index`: of the sample within its step; those of a problem stand side by side."""
    if reward == "coin":
        return float(index % 2)
    match = re.search(r"\\boxed\{([^{}]*)\}", text)
    return float(match is not None and match[1] == gold)


class Clock:
    """Measures from the end of the warm-up to the end of the last step."""

    def __init__(self, steps: int) -> None:
        self._last = WARM_UP + steps
        self._stack = ExitStack()
        self._peak = Peak()
        self._started = (0.0, 0.0)
        self._took = (0.0, 0.0)
        self.running = False
        self.tokens = 0
        """Completion tokens, counted by whoever gives the rewards."""

    def step_ended(self, step: int) -> None:
        now = time.perf_counter(), time.process_time()
        if step == WARM_UP:
            self._peak = self._stack.enter_context(peak_growth())
            self._started, self.running = (time.perf_counter(), time.process_time()), True
        elif step == self._last:
            self._took, self.running = (now[0] - self._started[0], now[1] - self._started[1]), False
            self._stack.close()

    def measured(self) -> Measured:
        seconds, cpu_seconds = self._took
        return Measured(seconds=seconds, cpu_seconds=cpu_seconds, tokens=self.tokens, peak_mib=self._peak.mib)


class PlainRewarder:
    """`reward_of` instead of the verifier's processes, which TRL does not have."""

    def __init__(self, reward: str, clock: Clock) -> None:
        self._reward = reward
        self._clock = clock
        self._settled = 0

    def verify(self, prompt: Prompt, sample: Sample) -> None:
        self._clock.tokens += len(sample.token_ids) * self._clock.running

    def reward(self, prompt: Prompt, sample: Sample, verification: None) -> Sample:
        earned = reward_of(self._reward, sample.text, prompt.problem.answer, self._settled)
        self._settled += 1
        return replace(
            sample, is_correct=earned == 1, has_format=True, rewards={"own": earned}, reward=earned
        )


def ampo(task: Task) -> Measured:
    clock = Clock(task.steps)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        config = load_config(Config, "configs/lab.toml", settings(task, folder))
        files = RunFiles(Path(folder) / "run")
        run = Run(config, files, None, TrainReporter(), stack)
        files.start(config, after=Position())
        rewarder: Any = PlainRewarder(task.reward, clock)
        run.rewarder = rewarder
        for step in range(1, WARM_UP + task.steps + 1):
            train_step(run, step)
            clock.step_ended(step)
    return clock.measured()


def settings(task: Task, folder: str) -> list[str]:
    size = SIZES[task.size]
    return [
        f"student.model={task.model}",
        f"student.dtype={'bfloat16' if size.bf16 else 'float32'}",
        f"run.dir={folder}",
        "eval.every=0",
        "verify.workers=1",
        "guidance.trigger=never",
        f"rollout.num_generations={size.samples}",
        f"rollout.max_completion_length={size.max_tokens}",
        f"train.problems_per_step={size.problems}",
        f"train.mini_batch_problems={size.problems}",
        f"train.learning_rate={LEARNING_RATE}",
        "train.entropy_coef=0",
        "train.is_cap=0",
        "run.log_completions_every=0",
    ]


def trl(task: Task, **changes: Any) -> Measured:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    clock = Clock(task.steps)

    def earned(
        completions: list[str], completion_ids: list[list[int]], gold: list[str], **_: Any
    ) -> list[float]:
        clock.tokens += sum(map(len, completion_ids)) * clock.running
        pairs = enumerate(zip(completions, gold, strict=True))
        return [reward_of(task.reward, text, answer, index) for index, (text, answer) in pairs]

    class Timing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.step_ended(state.global_step)

    with TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(task.model)
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32),
            reward_funcs=earned,
            args=GRPOConfig(output_dir=folder, **(trl_options(task) | changes)),
            train_dataset=Dataset.from_list(trl_rows(tokenizer)),
            processing_class=tokenizer,
            callbacks=[Timing()],
        )
        trainer.train()
    return clock.measured()


def trl_options(task: Task) -> dict[str, Any]:
    size = SIZES[task.size]
    return {
        "max_steps": WARM_UP + task.steps,
        "per_device_train_batch_size": size.problems * size.samples,
        "num_generations": size.samples,
        "max_completion_length": size.max_tokens,
        "temperature": 1.0,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "beta": 0.0,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "disable_dropout": True,
        "gradient_checkpointing": False,
        "bf16": size.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def trl_rows(tokenizer: Any) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in Path(PROBLEMS).read_text(encoding="utf-8").splitlines()]
    return [
        {
            "prompt": tokenizer.apply_chat_template(
                [{"role": "user", "content": row["question"]}], add_generation_prompt=True, tokenize=False
            ),
            "gold": row["answer"],
        }
        for row in rows
    ]


def trl_continuous(task: Task) -> Measured:
    return trl(task, use_transformers_continuous_batching=True)


def trl_micro(task: Task) -> Measured:
    size = SIZES[task.size]
    return trl(
        task,
        per_device_train_batch_size=size.problems * size.samples // 4,
        gradient_accumulation_steps=4,
    )


WAYS: dict[str, Callable[[Task], Measured]] = {
    "trl": trl,
    "trl, micro-batches": trl_micro,
    "trl, continuous": trl_continuous,
    "ampo": ampo,
}


FIGURES: dict[str, Callable[[Measured], str]] = {
    "tokens": lambda way: f"{way.tokens:,}",
    "seconds": lambda way: f"{way.seconds:.2f}",
    "tokens/s": lambda way: f"{way.tokens_per_second:,.0f}",
    "CPU s": lambda way: f"{way.cpu_seconds:.2f}",
    "peak MiB": lambda way: f"{way.peak_mib:,.1f}",
}


def summary(way: Measured) -> dict[str, float]:
    return {
        "tokens": way.tokens,
        "seconds": round(way.seconds, 3),
        "cpu_seconds": round(way.cpu_seconds, 3),
        "tokens_per_second": round(way.tokens_per_second, 1),
        "peak_mib": round(way.peak_mib, 1),
    }


def ratios(ways: Mapping[str, Measured]) -> dict[str, float]:
    """Of ours to the fastest of TRL's ways; memory to the smallest."""
    own, others = ways["ampo"], [way for name, way in ways.items() if name != "ampo"]
    return {
        "speed": round(own.tokens_per_second / max(way.tokens_per_second for way in others), 2),
        "cpu": round(own.tokens / own.cpu_seconds / max(way.tokens / way.cpu_seconds for way in others), 2),
        "memory": round(own.peak_mib / min(way.peak_mib for way in others), 3),
    }


if __name__ == "__main__":
    main()
