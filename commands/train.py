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
)

if TYPE_CHECKING:
    from rich.console import Console


def train(
    config: ConfigOption = None,
    set_: SetOption = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: go on from the run's last checkpoint; never: refuse an existing run; or a path."
        ),
    ] = "auto",
    dry_run: DryRun = False,
) -> None:
    """Train the student; ask the store only for problems whose samples all failed.

    Ctrl-C finishes the step, saves, and says how to go on.

    Example: `ampo train --config configs/lab.toml --set run.name=first --set train.max_steps=20`

    On several devices: `torchrun --standalone --nproc-per-node 4 --no-python ampo train --config my.toml`
    """
    settings, console = read_config(config, set_), console_of()
    if dry_run:
        from trainer.dry_run import dry_run_of

        report = dry_run_of(settings)
        print_config(console, settings)
        console.print(report)
        return
    from trainer.console import reporter_of
    from trainer.distributed import joined
    from trainer.loop import train as run_training

    try:
        with joined(settings.student.device) as world, reporter_of(world, console, settings.run) as reporter:
            outcome = run_training(settings, resume=resume, reporter=reporter, world=world)
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


def _say_done(console: Console, run: Path, last: str) -> None:
    shown = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
    console.print(
        f"done: {last}. Look: ampo inspect run {shown}   ampo inspect store queries {shown}",
        highlight=False,
        soft_wrap=True,
    )


def evaluate(
    model: Annotated[str, typer.Argument(help="A model directory (a checkpoint, say) or a hub name.")],
    problems: Annotated[
        str, typer.Option(help="Parquet or JSONL; default: the config's problems.eval.")
    ] = "",
    samples: Annotated[int | None, typer.Option(min=1, help="Samples of each problem.")] = None,
    k: Annotated[str, typer.Option(help="The k of pass@k, e.g. 1,8; default: the config's eval.k.")] = "",
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> None:
    """Measure avg@n and the unbiased pass@k of a model on a problem file.

    Example: `ampo eval lab/models/student --config configs/lab.toml --samples 8 --k 1,8`
    """
    from trainer.console import ConsoleReporter
    from trainer.eval_model import evaluate_model
    from trainer.tables import evaluation_table

    overrides = [*(set_ or []), f"student.model={json.dumps(model)}"]
    if problems:
        overrides.append(f"problems.eval={json.dumps(problems)}")
    if samples is not None:
        overrides.append(f"eval.samples={samples}")
    if k:
        overrides.append(f"eval.k=[{k}]")
    settings = read_config(config, overrides)
    with ConsoleReporter(console_of(stderr=True), settings.run) as reporter:
        evaluation = evaluate_model(settings, reporter)
    if json_:
        emit_json({"model": model, **evaluation.metrics})
    else:
        console_of().print(evaluation_table(model, evaluation))
