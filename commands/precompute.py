"""`ampo precompute`: the offline stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from commands.shared import ConfigOption, DryRun, SetOption, console_of, print_config, read_config

if TYPE_CHECKING:
    from rich.console import Console

    from precompute.outcome import PrecomputePlan
    from precompute.progress import Reporter
    from trainer.config import Config

app = typer.Typer(no_args_is_help=True, help="The offline stage: teachers fill the store.")


@app.command("teachers")
def precompute_teachers(
    config: ConfigOption = None,
    set_: SetOption = None,
    teacher: Annotated[
        list[str] | None, typer.Option(help="Only this teacher. May be repeated; default: all.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="auto, vllm, transformers or openai; default: what each teacher's table says. ray: the "
            "teachers' own engines on the workers of a Ray cluster, the one at RAY_ADDRESS or the one that "
            "`ray start` started on this machine; see [ray] in the config."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N problems.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="i/n, e.g. 3/16: only the i-th of n shards of the problems, beside processes that take the "
            "others into the same store. All must name the same n."
        ),
    ] = None,
    dry_run: DryRun = False,
    probe: Annotated[
        int,
        typer.Option(
            min=0,
            help="Draw one sample of N problems of each teacher, keep nothing, and show what a run would "
            "take: tokens, hours, disk. Implies --dry-run.",
        ),
    ] = 0,
) -> None:
    """Let teachers solve the training problems; verify every solution into the store.

    Stopped at any moment, the same command goes on where it was.

    Example: `ampo precompute teachers --config configs/lab.toml --limit 64`

    On many machines with a common directory: `ampo precompute teachers --config F --shard 3/16`
    """
    from precompute import pipeline
    from precompute.sharding import Shard
    from precompute.tables import report_tables

    part = Shard.parse(shard) if shard is not None else None
    settings, console = read_config(config, set_), console_of()
    names = list(teacher) if teacher else None
    if dry_run or probe:
        with _reporting(console, "nothing was kept") as reporter:
            plan = pipeline.plan(
                settings,
                teachers=names,
                engine=engine,
                limit=limit,
                shard=part,
                probe=probe,
                reporter=reporter,
            )
        _show_plan(console, settings, plan)
        return
    kept = "what the workers wrote" if engine == "ray" else "every verified trace"
    with _reporting(console, f"{kept} is kept. Go on with the same command") as reporter:
        report = pipeline.run(
            settings, teachers=names, engine=engine, limit=limit, shard=part, reporter=reporter
        )
    console.print(report_tables(report))


@contextmanager
def _reporting(console: Console, when_interrupted: str) -> Iterator[Reporter]:
    """Ctrl-C leaves with a line that says what became of the work."""
    from precompute.progress import ConsoleReporter

    try:
        with ConsoleReporter(console) as reporter:
            yield reporter
    except KeyboardInterrupt:
        console.print(f"\ninterrupted; {when_interrupted}.")
        raise typer.Exit(130) from None


def _show_plan(console: Console, config: Config, plan: PrecomputePlan) -> None:
    from precompute.tables import plan_tables
    from trainer.rollout import demanded_form

    print_config(console, config)
    student_form = demanded_form(config.student, [plan.first_problem])
    console.print(plan_tables(plan, student_form=student_form))
