"""`ampo train` and `ampo eval`: the online stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.shared import (
    ConfigOption,
    DryRun,
    JsonFlag,
    SetOption,
    console_of,
    emit_json,
    print_config,
    read_config,
    say_error,
    told_with_config,
    with_config,
)
from store.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.config import Config


def train(
    config: ConfigOption = None,
    set_: SetOption = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: go on from the run's last checkpoint; never: refuse an existing run; or a path."
        ),
    ] = "auto",
    changed_store: Annotated[
        bool,
        typer.Option(
            "--resume-with-changed-store", help="Go on though the store holds other traces than before."
        ),
    ] = False,
    dry_run: DryRun = False,
    gpu: Annotated[
        str, typer.Option(help="With --dry-run: the card to plan for, e.g. H100-80GB, RTX4090-24GB.")
    ] = "",
    processes: Annotated[int, typer.Option(min=1, help="With --dry-run: how many GPUs share the run.")] = 1,
) -> None:
    """Train the student; ask the store only for problems whose samples all failed.

    Ctrl-C finishes the step, saves, and says how to go on.

    `--dry-run` tells the plan even where problems, store or student are still missing; each of them is an
    error then, as a run would end with, and the exit code is 2.

    Example: `ampo train --config configs/lab.toml --set run.name=first --set train.max_steps=20`

    On several devices: `torchrun --standalone --nproc-per-node 4 --no-python ampo train --config my.toml`
    """
    settings, console = read_config(config, set_), console_of()
    if dry_run:
        _show_dry_run(settings, config, gpu, processes)
        return
    if gpu or processes > 1:
        raise UserError("--gpu and --processes plan a run: they go with --dry-run alone")
    from trainer.console import reporter_of
    from trainer.distributed import joined
    from trainer.loop import train as run_training

    try:
        with (
            joined(settings.student.device) as world,
            reporter_of(world, console, settings.run) as reporter,
            told_with_config(config),
        ):
            outcome = run_training(
                settings, resume=resume, changed_store=changed_store, reporter=reporter, world=world
            )
    except KeyboardInterrupt:
        console.print("stopped at once; what was saved before is whole. Go on with the same command.")
        raise typer.Exit(130) from None
    if not world.is_first:
        raise typer.Exit(130 if outcome.interrupted_by else 0)
    if outcome.interrupted_by:
        saved = f"saved {outcome.checkpoint}" if outcome.checkpoint else "there was nothing to save yet"
        console.print(
            f"stopped by {outcome.interrupted_by} after {outcome.done}; {saved}. "
            f"Go on with the same command (--resume auto is the default).",
            soft_wrap=True,
        )
        raise typer.Exit(130)
    _say_done(console, outcome.run, str(outcome.done))


def _show_dry_run(settings: Config, file: str | None, gpu: str, processes: int) -> None:
    from trainer.dry_run import dry_run_of

    found = dry_run_of(settings, gpu=gpu, processes=processes)
    console = console_of()
    print_config(console, settings)
    console.print(found.report)
    for error in found.missing:
        say_error(with_config(error, file))
    if found.missing:
        raise typer.Exit(2)


def _say_done(console: Console, run: Path, last: str) -> None:
    shown = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    console.print(
        f"done: {last}. Look:\n  ampo inspect run {shown}\n  ampo inspect store queries {shown}",
        highlight=False,
        soft_wrap=True,
    )


def evaluate(
    model: Annotated[str, typer.Argument(help="A model directory (a checkpoint, say) or a hub name.")],
    problems: Annotated[
        str, typer.Option(help="Parquet or JSONL; default: the config's problems.eval.")
    ] = "",
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples of each problem, at least as many as its file states it; default: the config's "
            "eval.samples, or the largest k.",
        ),
    ] = None,
    k: Annotated[str, typer.Option(help="The k of pass@k, e.g. 1,8,32; default: the config's eval.k.")] = "",
    engine: Annotated[
        str | None,
        typer.Option(help="auto, transformers, vllm or openai; default: the config's eval.engine."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where the samples go; default: a directory in runs/evals for just this evaluation."
        ),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> None:
    """Measure avg@n and the unbiased pass@k of a model on a problem file, with confidence intervals.

    Every sample is kept as Parquet as it comes; stopped at any moment, the same command goes on.

    Example: `ampo eval lab/models/student --config configs/lab.toml --k 1,8,32`

    By servers: `ampo eval MODEL --engine openai --set eval.engine_args.base_urls='["http://gpu1:8000/v1"]'`
    """
    from trainer.console import ConsoleReporter
    from trainer.eval_model import evaluate_model
    from trainer.tables import evaluation_table

    own = _eval_overrides(model, problems, samples, k, engine)
    asked_for = _whole_numbers(k) if k else []
    if samples is not None and not k:
        # pass@k beyond n samples does not exist.
        own.append(f"eval.k={[each for each in read_config(config, set_).eval.k if each <= samples] or [1]}")
    if samples is None and asked_for:
        # As many as the largest k needs, where the config asks for fewer.
        asked = read_config(config, set_).eval.samples
        own.append(f"eval.samples={max(asked, *asked_for)}")
    settings = read_config(config, [*(set_ or []), *own])
    console = console_of(stderr=True)

    def started(folder: Path, there: int, wanted: int) -> None:
        goes_on = f"{there:,} of {wanted:,} samples are there" if there else f"{wanted:,} samples to draw"
        console.print(f"{folder}: {goes_on}", highlight=False, soft_wrap=True, markup=False)

    try:
        with ConsoleReporter(console, settings.run) as reporter:
            report = evaluate_model(settings, reporter, out=out, on_start=started)
    except KeyboardInterrupt:
        console.print("\ninterrupted; what was judged is kept. Go on with the same command.")
        raise typer.Exit(130) from None
    if json_:
        emit_json({**report.results, "out": str(report.out)})
    else:
        console_of().print(evaluation_table(model, report.evaluation))


def _whole_numbers(k: str) -> list[int]:
    found = [int(each) if each.strip().isdecimal() else 0 for each in k.split(",")]
    if min(found) < 1:
        raise UserError(f"--k {k}: write whole numbers of 1 or more with commas between, e.g. 1,8,32")
    return found


def _eval_overrides(model: str, problems: str, samples: int | None, k: str, engine: str | None) -> list[str]:
    overrides = [f"student.model={json.dumps(model)}"]
    if problems:
        overrides.append(f"problems.eval={json.dumps(problems)}")
    if engine is not None:
        overrides.append(f"eval.engine={json.dumps(engine)}")
    if k:
        overrides.append(f"eval.k=[{k}]")
    if samples is not None:
        overrides.append(f"eval.samples={samples}")
    return overrides
