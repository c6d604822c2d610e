"""`ampo precompute`: the offline stage."""

from __future__ import annotations

from typing import Annotated

import typer

from commands.shared import ConfigOption, DryRun, SetOption, console_of, print_config, read_config

app = typer.Typer(no_args_is_help=True, help="The offline stage: teachers fill the store.")


@app.command("teachers")
def precompute_teachers(
    config: ConfigOption = None,
    set_: SetOption = None,
    teacher: Annotated[
        list[str] | None, typer.Option(help="Only this teacher. May be repeated; default: all.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="auto, vllm or transformers; default: what each teacher's table says.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N problems.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Let teachers solve the training problems; verify every solution into the store.

    Stopped at any moment, the same command goes on where it was.

    Example: `ampo precompute teachers --config configs/lab.toml --limit 64`
    """
    from precompute import pipeline
    from precompute.progress import ConsoleReporter
    from precompute.tables import plan_tables, report_tables

    settings, console = read_config(config, set_), console_of()
    names = list(teacher) if teacher else None
    if dry_run:
        plan = pipeline.plan(settings, teachers=names, engine=engine, limit=limit)
        print_config(console, settings)
        console.print(plan_tables(plan))
        return
    try:
        with ConsoleReporter(console) as reporter:
            report = pipeline.run(settings, teachers=names, engine=engine, limit=limit, reporter=reporter)
    except KeyboardInterrupt:
        console.print("\ninterrupted; every verified trace is kept. Go on with the same command.")
        raise typer.Exit(130) from None
    console.print(report_tables(report))
