"""Makes the lab from scratch: problem files, five models, and a card with their measured accuracy.

    out/problems/train.jsonl  heldout.jsonl  harder.jsonl
    out/models/student/  teacher-*/  card.json

A model's directory appears whole, by rename; the card is written last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import GenerationConfig, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

from lab.measure import measure
from lab.pretrain import pretrain
from lab.problems import Chain, draw_sets, write_jsonl
from lab.recipes import LAB, LabRecipe, ModelRecipe
from lab.tokenizer import END_ID, PAD_ID, WORK, build_tokenizer
from store.errors import UserError

PLAIN_EVERY = 100
"""Steps between two log lines where there is no terminal."""


def build(
    out: Path,
    *,
    seed: int = 0,
    recipe: LabRecipe = LAB,
    only: Sequence[str] = (),
    console: Console | None = None,
) -> Path:
    """Builds the lab under `out` and returns the path of its card.

    The same seed and recipe give the same bits on the same kind of processor. `only` names the models to
    make again; the others keep their weights and their entry on the card. Raises UserError for an unknown
    name.
    """
    chosen = _choose(recipe, only)
    console = console or Console(stderr=True)
    sets = draw_sets(recipe.sets, seed=seed)
    for name, chains in sets.items():
        write_jsonl(out / "problems" / f"{name}.jsonl", chains)
    card = out / "models" / "card.json"
    rows = _rows_of(card) if only else {}
    with _threads(recipe.threads):
        for model in chosen:
            rows[model.name] = _make(out / "models", model, recipe, sets, seed=seed, console=console)
    names = [model.name for model in recipe.models if model.name in rows]
    card.write_text(json.dumps({name: rows[name] for name in names}, indent=2) + "\n", encoding="utf-8")
    return card


def _choose(recipe: LabRecipe, only: Sequence[str]) -> list[ModelRecipe]:
    known = [model.name for model in recipe.models]
    for name in only:
        if name not in known:
            raise UserError(f"no lab model is named {name!r}; there are {', '.join(known)}")
    return [model for model in recipe.models if not only or model.name in only]


def _rows_of(card: Path) -> dict[str, Any]:
    return dict(json.loads(card.read_text(encoding="utf-8"))) if card.exists() else {}


def _make(
    models: Path,
    recipe: ModelRecipe,
    lab: LabRecipe,
    sets: Mapping[str, list[Chain]],
    *,
    seed: int,
    console: Console,
) -> dict[str, Any]:
    """Trains, saves and measures one model; returns its row of the card."""
    tokenizer = build_tokenizer()
    seen = {chain.question for chains in sets.values() for chain in chains}
    start = monotonic()
    with _progress(console, recipe) as on_step:
        model = pretrain(recipe, tokenizer, seen=seen, seed=seed, on_step=on_step)
    seconds = monotonic() - start
    save_model(model, tokenizer, models / recipe.name)
    row = {
        "seed": seed,
        "steps": recipe.steps,
        "seconds": round(seconds, 1),
        "parameters": sum(weights.numel() for weights in model.parameters()),
        **_measure_all(model, tokenizer, lab, sets, seed=seed, has_skill=_hides_a_skill(recipe)),
    }
    console.print(_report(recipe.name, row), highlight=False, soft_wrap=True)
    return row


def _hides_a_skill(recipe: ModelRecipe) -> bool:
    return any(habit.mark == WORK for habit in recipe.mixture)


def _measure_all(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    lab: LabRecipe,
    sets: Mapping[str, list[Chain]],
    *,
    seed: int,
    has_skill: bool,
) -> dict[str, Any]:
    measured = {
        name: asdict(measure(model, tokenizer, chains, lab.evaluation, seed=seed))
        for name, chains in sets.items()
        if next(plan for plan in lab.sets if plan.name == name).is_measured
    }
    if has_skill:
        for name in lab.skill_sets:
            skill = measure(model, tokenizer, sets[name], lab.evaluation, seed=seed, mark=WORK)
            measured[f"{name}, after {WORK}"] = asdict(skill)
    return measured


def _report(name: str, row: Mapping[str, Any]) -> str:
    shares = [f"{key} {value['correct_share']:.0%}" for key, value in row.items() if isinstance(value, dict)]
    return f"{name}: {row['steps']} steps in {row['seconds']:.0f} s; correct: {', '.join(shares)}"


def save_model(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, path: Path) -> None:
    """Writes weights, tokenizer and generation config as `path`, aside first and then by rename."""
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, temperature=1.0, eos_token_id=[END_ID], pad_token_id=PAD_ID
    )
    with _quiet_transformers():
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    shutil.rmtree(path, ignore_errors=True)
    aside.rename(path)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hides transformers' progress bar for the block: it would break ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def _progress(console: Console, recipe: ModelRecipe) -> Iterator[Any]:
    """Yields `on_step(step, loss)`: a bar on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        yield lambda step, loss: _plain_line(console, recipe, step, loss)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    loss_column = TextColumn("loss {task.fields[loss]:.3f}")
    with Progress(*columns, loss_column, console=console, transient=True) as bars:
        task = bars.add_task(recipe.name, total=recipe.steps, loss=float("nan"))
        yield lambda step, loss: bars.update(task, completed=step, loss=loss)


def _plain_line(console: Console, recipe: ModelRecipe, step: int, loss: float) -> None:
    if step % PLAIN_EVERY == 0 or step == recipe.steps:
        console.print(f"{recipe.name}: step {step} of {recipe.steps}, loss {loss:.3f}", highlight=False)
