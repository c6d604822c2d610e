"""The output head, forward and backward, side by side: log-probability and entropy of the target tokens.

    python -m bench.head [--tokens 1024 4096] [--hidden 896 1536] [--heads trained frozen] [--entropy no yes]

    token chunks   float32 logits of 1,024 tokens at a time, computed again in the backward pass by torch's
                   checkpointing where there are more: the trainer's earlier way
    ampo           `trainer.student.head`: a slice of the vocabulary at a time, its gradient made in place
    trl            TRL's log-probabilities and entropy of whole logits, where TRL is installed
    liger          Liger's fused linear cross-entropy (no entropy), where it is installed and there is a GPU

    trained        float32 head and hidden states, as in training all weights; products may use TF32 on CUDA
    frozen         bfloat16 head and hidden states, as under LoRA
    entropy        yes: the entropy has a gradient, too (train.entropy_coef > 0); no: it is only reported

On the CPU each way has a process of its own, with one thread, and another for its memory, and seconds are CPU
seconds. Memory is the peak beyond head, hidden states and targets, gradients included. `products`: seconds in
units of one bare product hidden weight^T in the same process. A way for which the memory does not suffice is
left out. Errors are those of the gradients of hidden states and head against
float64, relative, over 64 tokens. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.measure import RETURNED_AT_ONCE, alone, peak_growth, synchronize, ways_table
from trainer.student.head import LogitScale, products_on, target_values

CHUNK = 1024
VALUES_PER_SLICE = 2**24
ERROR_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one process does."""

    way: str
    tokens: int
    hidden: int
    vocabulary: int
    head: str
    entropy: str
    repeats: int

    @property
    def case(self) -> str:
        return f"{self.tokens} x {self.hidden} {self.head}, entropy {self.entropy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    seconds: float
    cpu_seconds: float
    products: float
    peak_mib: float
    hidden_error: float
    head_error: float | None
    """None of a frozen head."""


Inputs = tuple[Tensor, Tensor, Tensor]
"""(hidden [N, H], weight [V, H], targets [N])."""


def main() -> None:
    options = parse()
    found: dict[str, dict[str, Measured]] = {}
    for tokens in options.tokens:
        for hidden in options.hidden:
            for head in options.heads:
                for entropy in options.entropy:
                    task = Task(
                        way="",
                        tokens=tokens,
                        hidden=hidden,
                        vocabulary=options.vocabulary,
                        head=head,
                        entropy=entropy,
                        repeats=options.repeats,
                    )
                    found[task.case] = measured(task, options.ways)
    Console(width=120).print(ways_table("log-probability and entropy", "tokens x hidden", found, FIGURES))
    rows = {case: {way: asdict(row) for way, row in ways.items()} for case, ways in found.items()}
    shares = {case: ratios(ways) for case, ways in found.items() if len(ways) > 1}
    print(json.dumps({"bench": "head", "vocabulary": options.vocabulary, "cases": rows, "ratios": shares}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096] if cuda else [1024])
    parser.add_argument("--hidden", nargs="+", type=int, default=[896, 1536] if cuda else [896])
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--heads", nargs="+", choices=["trained", "frozen"], default=["trained", "frozen"])
    parser.add_argument("--entropy", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--repeats", type=int, default=3 if cuda else 1)
    installed = {"trl": find_spec("trl") is not None, "liger": cuda and find_spec("liger_kernel") is not None}
    default = [way for way in WAYS if installed.get(way, way != "float64")]
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=default)
    return parser.parse_args()


def measured(task: Task, ways: list[str]) -> dict[str, Measured]:
    found = {}
    for way in ways:
        try:
            found[way] = measure(replace(task, way=way))
            print(f"{task.case}: {way}: {found[way]}", file=sys.stderr)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return found


def measure(task: Task) -> Measured:
    if torch.cuda.is_available():
        return run(task)
    timed = alone(run, task)
    weighed = alone(run, replace(task, repeats=0), **RETURNED_AT_ONCE)
    return replace(timed, peak_mib=weighed.peak_mib)


def run(task: Task) -> Measured:
    """The errors, in a small pass that also loads what a way imports; one pass that warms up where there are
    repeats, and the best of these."""
    torch.set_num_threads(1)
    hidden_error, head_error = errors(task)
    inputs = inputs_of(task, task.tokens)
    times = [timed(passes, task, inputs) for _ in range(task.repeats + (task.repeats > 1))]
    product = min(timed(bare_product, task, inputs)[1] for _ in range(2)) if times else 1.0
    with peak_growth() as peak:
        if torch.cuda.is_available() or not times:
            passes(task, inputs)
            synchronize()
    cpu_seconds, seconds = min(times, default=(0.0, 0.0))
    return Measured(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        products=(seconds if torch.cuda.is_available() else cpu_seconds) / product,
        peak_mib=peak.mib,
        hidden_error=hidden_error,
        head_error=head_error,
    )


def inputs_of(task: Task, tokens: int) -> Inputs:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if task.head == "trained" else torch.bfloat16
    hidden = torch.randn(tokens, task.hidden).to(device, dtype).requires_grad_()
    # Logits of standard deviation 2: not far from uniform, not certain.
    weight = torch.randn(task.vocabulary, task.hidden).mul_(2 * task.hidden**-0.5).to(device, dtype)
    weight.requires_grad_(task.head == "trained")
    return hidden, weight, torch.randint(task.vocabulary, (tokens,), device=device)


def timed(what: Callable[[Task, Inputs], object], task: Task, inputs: Inputs) -> tuple[float, float]:
    """Returns CPU seconds and seconds; the first is what counts on a busy CPU."""
    synchronize()
    cpu, started = time.process_time(), time.perf_counter()
    what(task, inputs)
    synchronize()
    cpu_seconds, seconds = time.process_time() - cpu, time.perf_counter() - started
    return cpu_seconds, seconds if torch.cuda.is_available() else cpu_seconds


@torch.no_grad()
def bare_product(task: Task, inputs: Inputs) -> Tensor:
    with products_on(inputs[0].is_cuda):
        return inputs[0] @ inputs[1].T


def passes(task: Task, inputs: Inputs) -> list[Tensor]:
    """One forward and backward pass; returns the gradients."""
    hidden, weight, _ = inputs
    found = WAYS[task.way](*inputs)
    upstream = torch.linspace(-1, 1, len(hidden), device=hidden.device)
    loss = (found[0] * upstream).sum()
    if task.entropy == "yes" and len(found) > 1:
        loss = loss + 0.1 * (found[1] * upstream).sum()
    return list(torch.autograd.grad(loss, [hidden, weight] if weight.requires_grad else [hidden]))


def errors(task: Task) -> tuple[float, float | None]:
    inputs = inputs_of(task, ERROR_TOKENS)
    found = [gradient.double() for gradient in passes(task, inputs)]
    hidden, weight, targets = inputs
    wide = hidden.detach().double().requires_grad_(), weight.detach().double(), targets
    wide[1].requires_grad_(weight.requires_grad)
    exact = passes(replace(task, way="float64", entropy=task.entropy if task.way != "liger" else "no"), wide)
    relative = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    return relative[0], relative[1] if len(relative) > 1 else None


def float64(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    every = (hidden @ weight.T).log_softmax(-1)
    return every.gather(1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)


def ampo(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    scale = LogitScale(tensor_cores=hidden.is_cuda)
    return target_values(hidden, weight, None, targets, scale=scale, entropy=True)


class WidenedProduct(torch.autograd.Function):
    """Logits [N, V] in float32, of a head that is made float32 a slice at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden if weight.requires_grad else None, weight)
        logits = hidden.new_empty(len(hidden), len(weight))
        with products_on(hidden.is_cuda):
            for start, wide in widened(weight):
                torch.mm(hidden, wide.T, out=logits[:, start : start + len(wide)])
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        of_hidden = gradients[0].new_zeros(len(gradients[0]), weight.shape[1])
        with products_on(of_hidden.is_cuda):
            for start, wide in widened(weight):
                of_hidden.addmm_(gradients[0][:, start : start + len(wide)], wide)
            return of_hidden, gradients[0].T @ hidden if ctx.needs_input_grad[1] else None


def widened(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    rows = len(weight) if weight.dtype == torch.float32 else VALUES_PER_SLICE // weight.shape[1]
    for start in range(0, len(weight), rows):
        yield start, weight[start : start + rows].float()


def token_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    def values(rows: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = WidenedProduct.apply(rows.float(), weight)  # type: ignore[no-untyped-call]
        log_total = torch.logsumexp(logits, dim=-1)
        p = torch.exp(logits - log_total.unsqueeze(-1))
        expected = (p * logits.masked_fill(p == 0, 0.0)).sum(dim=-1)
        return logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - log_total, log_total - expected

    pairs = zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True)
    if len(hidden) <= CHUNK:
        return values(hidden, targets)
    parts = [checkpoint(values, *pair, use_reentrant=False) for pair in pairs]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = hidden @ weight.T
    return selective_log_softmax(logits, targets), entropy_from_logits(logits)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return (-LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, targets),)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "token chunks": token_chunks,
    "trl": trl,
    "liger": liger,
    "ampo": ampo,
    "float64": float64,
}
FIGURES: dict[str, Callable[[Measured], str]] = {
    "seconds": lambda way: f"{way.seconds:.4f}",
    "products": lambda way: f"{way.products:.2f}",
    "peak MiB": lambda way: f"{way.peak_mib:,.0f}",
    "error, hidden": lambda way: f"{way.hidden_error:.1e}",
    "error, head": lambda way: "" if way.head_error is None else f"{way.head_error:.1e}",
}


def ratios(ways: Mapping[str, Measured]) -> dict[str, dict[str, float]]:
    """Ours to each other way's."""
    if "ampo" not in ways:
        return {}
    own = ways["ampo"]
    return {
        name: {"time": round(own.products / way.products, 3), "memory": round(own.peak_mib / way.peak_mib, 3)}
        for name, way in ways.items()
        if name != "ampo"
    }


if __name__ == "__main__":
    main()
