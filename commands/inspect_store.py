"""`ampo inspect store`: what a store holds, and what was asked of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from commands.shared import CsvFlag, JsonFlag, StorePath, console_of, emit_json, emit_rows
from store.errors import UserError

if TYPE_CHECKING:
    from trainer.config import Config

app = typer.Typer(no_args_is_help=True, help="Look into a store, and what was asked of it.")


@app.command("queries")
def inspect_queries(
    run: Annotated[
        str | None, typer.Argument(help="A run's directory; default: the last below runs/.")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Only this step.")] = None,
    problem: Annotated[str | None, typer.Option(help="Only this problem_id, or its beginning.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Only questions to which this teacher had a trace.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Show the last N questions; 0: all.")] = 20,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """Show what the trainer asked the store, what came back, and what was used.

    `--json` and `--csv` give every row that the filters leave.

    Example: `ampo inspect store queries runs/lab-ampo --step 3`
    """
    from trainer.inspection import query_rows, questions_of, summary_of
    from trainer.run_files import latest_run, open_run, run_config
    from trainer.tables import queries_table, summary_line

    files = open_run(run if run is not None else latest_run("runs"))
    rows = query_rows(files, step=step, problem=problem, teacher=teacher)
    if emit_rows(rows, json_, csv_):
        return
    questions, console = questions_of(rows), console_of()
    shown = questions[-limit:] if limit else questions
    console.print(queries_table(shown, _problem_texts(run_config(files))))
    if len(shown) < len(questions):
        console.print(f"the last {len(shown)} of {len(questions)} questions; --limit 0 shows all")
    console.print(
        f"{files.root.name}: {summary_line(summary_of(questions))}", highlight=False, soft_wrap=True
    )


def _problem_texts(config: Config) -> dict[str, str]:
    """Question texts for the table, where the store is still there to tell them."""
    from store.trace_store import TraceStore

    try:
        with TraceStore(config.store.path) as store:
            return {problem.problem_id: problem.question for problem in store.problems()}
    except UserError:
        return {}


@app.command("summary")
def inspect_summary(store: StorePath = "traces", json_: JsonFlag = False) -> None:
    """Show teachers, verdicts, coverage and tokens of a store.

    Example: `ampo inspect store summary traces`
    """
    from dataclasses import asdict

    from store.report import store_report
    from store.tables import summary_tables
    from store.trace_store import TraceStore

    with TraceStore(store) as opened:
        report = store_report(opened)
    if json_:
        emit_json(asdict(report))
    else:
        console_of().print(summary_tables(report))


@app.command("traces")
def inspect_traces(
    store: StorePath = "traces",
    problem: Annotated[str | None, typer.Option(help="Only this problem_id; shows whole texts.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Only this teacher.")] = None,
    verdict: Annotated[str | None, typer.Option(help="Only this verdict, e.g. mismatch.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="At most N traces; 0: all.")] = 20,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """Read traces side by side.

    Example: `ampo inspect store traces traces --problem 5f0c1d2e3a4b5c6d`
    """
    from store.records import VERDICTS
    from store.report import trace_rows
    from store.tables import traces_table
    from store.trace_store import TraceStore

    if verdict is not None and verdict not in VERDICTS:
        raise UserError(f"--verdict {verdict}: one of {', '.join(VERDICTS)}")
    with TraceStore(store) as opened:
        rows = trace_rows(opened, problem_id=problem, teacher=teacher, verdict=verdict, limit=limit or None)
    if not emit_rows(rows, json_, csv_):
        console_of().print(traces_table(rows, full=problem is not None))


@app.command("problems")
def inspect_problems(
    store: StorePath = "traces",
    uncovered: Annotated[
        bool, typer.Option("--uncovered", help="Only those that no teacher solved.")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="At most N problems; 0: all.")] = 20,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """List problems, hardest first, with the teachers that solved them.

    Example: `ampo inspect store problems traces --uncovered`
    """
    from store.report import problem_rows
    from store.tables import problems_table
    from store.trace_store import TraceStore

    with TraceStore(store) as opened:
        rows = problem_rows(opened, uncovered=uncovered, limit=limit or None)
    if not emit_rows(rows, json_, csv_):
        console_of().print(problems_table(rows))
