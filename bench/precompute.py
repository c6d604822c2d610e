"""What stopping at enough saves, and what the pipeline costs on top of bare vLLM, on the lab's teachers.

    python -m bench.precompute [--problems 64] [--overhead-problems 256] [--repeats 5]

Tries: every (problem, teacher) pair gets 8 samples (fixed), and in another run up to 8 until one is verified.
Fixed numbers below 8 are read off the first run: the n-th sample of a pair is the same whatever n is.

Overhead: seconds from problems to a closed store (prompts, vLLM, verdicts, parts, index) against bare
`LLM.generate` on the same prompts, seeds and settings, both warm, turn by turn; loading is left out of both.
Each has a process of its own for vLLM, whose CPU seconds are told too: what else runs on the machine moves
them little. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from precompute.config_file import load_config
from precompute.engines import Engine
from precompute.engines.checks import stop_ids_of
from precompute.engines.registry import engine_version, load_engine, load_tokenizer
from precompute.engines.vllm_engine import DEFAULT_ENVIRONMENT, llm_options
from precompute.problems.problem_files import load_problems
from precompute.problems.prompts import tokenizer_fingerprint
from precompute.run import pipeline
from precompute.run.progress import Reporter
from precompute.run.solve import PreparedTeacher, Solver, fill_prompts, longest_prompt, sample_seed
from precompute.verify.verifier import MATH_VERSIONS, Verifier
from store.reader import TraceStore
from store.records import Problem, TeacherRecord
from store.terminal.tables import plain_table
from store.writer import StoreWriter
from trainer.config import Config

SAMPLES = 8
OVERHEAD_SAMPLES = 8
MARK = "bench: "
"""Before what the bare process says; vLLM talks too."""


def main() -> None:
    options = parse()
    if options.bare:
        bare_process()
        return
    # Models this small only wait for further threads, and threads that spin starve whoever works.
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    console = Console()
    with TemporaryDirectory() as directory:
        tries = measure_tries(options.config, Path(directory), options.problems)
        console.print(tries_table(tries))
        overhead = {}
        if not options.tries_only:
            overhead = measure_overhead(options, Path(directory))
            console.print(overhead_table(overhead))
    print(json.dumps({"bench": "precompute", "tries": [vars_of(row) for row in tries], "overhead": overhead}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", default="configs/lab.toml")
    parser.add_argument("--problems", type=int, default=64, help="of the tries")
    parser.add_argument("--overhead-problems", type=int, default=256, help=f"x {OVERHEAD_SAMPLES} samples")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tries-only", action="store_true", help="for a machine without vLLM")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tries:
    """What one way to draw came to, over all (problem, teacher) pairs."""

    plan: str
    samples: int
    tokens: int
    solved: int
    """Pairs with a verified trace."""
    pairs: int

    @property
    def tokens_per_solved(self) -> float:
        return self.tokens / self.solved


def vars_of(row: Tries) -> dict[str, Any]:
    fields = {name: getattr(row, name) for name in ("plan", "samples", "tokens", "solved", "pairs")}
    return fields | {"tokens_per_solved": round(row.tokens_per_solved, 1)}


def measure_tries(path: str, directory: Path, problems: int) -> list[Tries]:
    """Fixed numbers of samples up to SAMPLES, and up to as many until one is verified."""
    base = [f"store.path={directory / 'fixed'}"]
    plain = load_config(Config, path, base)
    names = [teacher.name for teacher in plain.teachers]
    fixed = [f"teachers.{name}.samples={SAMPLES}" for name in names]
    stop = ("until_verified=1", f"max_samples={SAMPLES}")
    until = [f"teachers.{name}.{key}" for name in names for key in stop]
    pipeline.run(load_config(Config, path, [*base, *fixed]), limit=problems)
    stopping = load_config(Config, path, [f"store.path={directory / 'until'}", *until])
    pipeline.run(stopping, limit=problems)
    pairs = problems * len(names)
    rows = [tries_of(f"fixed {n}", directory / "fixed", n, pairs) for n in range(1, SAMPLES + 1)]
    return [*rows, tries_of(f"until 1 verified ({SAMPLES})", directory / "until", SAMPLES, pairs)]


def tries_of(plan: str, store: Path, samples: int, pairs: int) -> Tries:
    """Of the first `samples` samples of each pair."""
    with TraceStore(store) as opened:
        (row,) = opened.index.rows(
            """SELECT count(*) AS samples, sum(n_tokens)::BIGINT AS tokens,
                      count(DISTINCT (problem_id, teacher)) FILTER (is_correct) AS solved
               FROM idx.traces WHERE sample_index < $samples""",
            {"samples": samples},
        )
    return Tries(plan=plan, pairs=pairs, **row)


def tries_table(rows: Sequence[Tries]) -> Table:
    """Tokens for what they bring."""
    table = plain_table("tokens per (problem, teacher) pair with a verified trace")
    table.add_column("samples of a pair")
    for name in ("samples", "tokens", "solved pairs", "tokens per solved pair"):
        table.add_column(name, justify="right")
    for row in rows:
        solved = f"{row.solved:,} of {row.pairs:,}"
        table.add_row(
            row.plan, f"{row.samples:,}", f"{row.tokens:,}", solved, f"{row.tokens_per_solved:,.0f}"
        )
    return table


def measure_overhead(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Seconds of each turn, ours and bare, and the medians' ratio."""
    import psutil  # type: ignore[import-untyped]  # comes with vLLM

    config, job, problems = overhead_job(options)
    filled = fill_prompts(job, problems, {}, Reporter())
    prompts = [
        {"ids": list(prompt.ids), "seed": sample_seed(problem_id, job.name, index)}
        for problem_id, prompt in filled.items()
        for index in range(job.config.samples)
    ]
    length = longest_prompt(filled)
    turns: dict[str, list[float]] = {"ours": [], "bare": []}
    cpu: dict[str, list[float]] = {"ours": [], "bare": []}
    tokens: dict[str, int] = {}
    engine = load_engine(job.config, "vllm", job.tokenizer, longest_prompt=length)
    our_vllm = psutil.Process().children()[0]
    with closing(engine), bare_vllm(job, prompts, length + job.config.max_tokens) as (bare, bare_process_id):
        processes = {"ours": our_vllm, "bare": psutil.Process(bare_process_id)}
        for turn in range(options.repeats + 1):
            for way in ("ours", "bare") if turn % 2 else ("bare", "ours"):
                store = directory / f"overhead-{turn}"
                before = processes[way].cpu_times()
                took, tokens[way] = bare() if way == "bare" else ours(engine, job, problems, config, store)
                if turn:  # the first is the warm-up
                    after = processes[way].cpu_times()
                    turns[way].append(took)
                    cpu[way].append(after.user + after.system - before.user - before.system)
    medians = {way: median(seconds) for way, seconds in turns.items()}
    return {
        "model": job.config.model,
        "requests": len(prompts),
        "tokens": tokens,
        "seconds": {way: [round(each, 2) for each in seconds] for way, seconds in turns.items()},
        "median_seconds": {way: round(seconds, 3) for way, seconds in medians.items()},
        "median_cpu_seconds_of_vllm": {way: round(median(seconds), 3) for way, seconds in cpu.items()},
        "overhead": round(medians["ours"] / medians["bare"] - 1, 4),
    }


def overhead_job(options: argparse.Namespace) -> tuple[Config, PreparedTeacher, tuple[Problem, ...]]:
    """The lab's first teacher, with several samples of each problem."""
    config = load_config(Config, options.config, [])
    teacher = config.teachers[0].model_copy(update={"samples": OVERHEAD_SAMPLES, "engine": "vllm"})
    tokenizer = load_tokenizer(teacher)
    record = TeacherRecord(
        name=teacher.name,
        model=teacher.model,
        revision=None,
        engine="vllm",
        engine_version=engine_version("vllm"),
        chat_template=str(tokenizer.chat_template),
        system_prompt=teacher.system_prompt,
        chat_template_kwargs={},
        sampling={},
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    job = PreparedTeacher(config=teacher, engine="vllm", tokenizer=tokenizer, record=record)
    return config, job, load_problems(config.problems.train).problems[: options.overhead_problems]


def ours(
    engine: Engine, job: PreparedTeacher, problems: Sequence[Problem], config: Config, path: Path
) -> tuple[float, int]:
    """(seconds, tokens) from problems to a closed store. The verifier's processes are up, as the model is,
    and know no answer yet."""
    with Verifier(config.verify) as verifier:
        verifier.gold_errors(["1"] * 2 * config.verify.workers)
        started = time.perf_counter()
        with StoreWriter.open(path, verifiers=MATH_VERSIONS) as writer:
            writer.write_problems(problems)
            writer.register_teacher(job.record)
            solver = Solver(job, problems, {}, verifier=verifier, filters=config.filters, reporter=Reporter())
            solver.fill_prompts()
            solver.run(engine, writer.append, config.store)
        return time.perf_counter() - started, solver.progress().tokens


@contextmanager
def bare_vllm(
    job: PreparedTeacher, prompts: Sequence[dict[str, Any]], length: int
) -> Iterator[tuple[Any, int]]:
    """A process with nothing but vLLM, as a function that generates once and returns (seconds, tokens), and
    its id."""
    environment = DEFAULT_ENVIRONMENT | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "bench.precompute", "--bare"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    talk, hear = process.stdin, process.stdout
    assert talk is not None
    assert hear is not None
    teacher = job.config
    setup = {
        # It decodes as it goes, as ours does: a trace is text.
        "options": llm_options(teacher, max_length=length) | {"skip_tokenizer_init": False},
        "sampling": {
            "temperature": teacher.temperature,
            "top_p": teacher.top_p,
            "top_k": teacher.top_k,
            "max_tokens": teacher.max_tokens,
            "stop_token_ids": list(stop_ids_of(teacher.model, teacher.revision, job.tokenizer)),
            "logprobs": 0,
        },
        "prompts": prompts,
    }
    talk.write(json.dumps(setup) + "\n")

    def generate() -> tuple[float, int]:
        talk.write("go\n")
        talk.flush()
        for line in hear:
            if line.startswith(MARK):
                said = json.loads(line.removeprefix(MARK))
                return said["seconds"], said["tokens"]
        raise RuntimeError("the bare vllm process ended")

    try:
        yield generate, process.pid
    finally:
        process.kill()
        process.wait()


def bare_process() -> None:
    """What a script without a pipeline would do."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    setup = json.loads(sys.stdin.readline())
    llm = LLM(**setup["options"])
    for _ in sys.stdin:
        started = time.perf_counter()
        outputs = llm.generate(
            [{"prompt_token_ids": prompt["ids"]} for prompt in setup["prompts"]],
            [
                SamplingParams(
                    seed=prompt["seed"], output_kind=RequestOutputKind.FINAL_ONLY, **setup["sampling"]
                )
                for prompt in setup["prompts"]
            ],
            use_tqdm=False,
        )
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(MARK + json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


def overhead_table(measured: dict[str, Any]) -> Table:
    """Seconds turn by turn."""
    table = plain_table(f"{measured['requests']:,} requests, {measured['tokens']['bare']:,} tokens")
    table.add_column("")
    table.add_column("seconds")
    table.add_column("median", justify="right")
    table.add_column("vllm's CPU", justify="right")
    for way, name in (("bare", "LLM.generate"), ("ours", "the whole pipeline")):
        turns = "  ".join(f"{each:.1f}" for each in measured["seconds"][way])
        busy = measured["median_cpu_seconds_of_vllm"][way]
        table.add_row(name, turns, f"{measured['median_seconds'][way]:.2f}", f"{busy:.2f}")
    table.caption = f"overhead {measured['overhead']:+.1%}"
    return table


if __name__ == "__main__":
    main()
