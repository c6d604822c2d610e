"""`ampo store` and `ampo inspect store`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from store.errors import UserError
from store.format.columns import views_help
from store.terminal.console import (
    CsvFlag,
    JsonFlag,
    ShownRows,
    StorePath,
    console_of,
    emit_json,
    emit_rows,
    escaped,
    on_interrupt,
    print_left_out,
    print_line,
    row_limit,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

inspect_app = typer.Typer(no_args_is_help=True, help="Look into a store, and the trainer's queries to it.")
app = typer.Typer(no_args_is_help=True, help="Check, compact, export or rebuild a store.")


def _show(rows: list[dict[str, Any]], table: RenderableType, as_json: bool, as_csv: bool) -> None:
    """Prints rows as JSON or CSV where one is requested, else their table."""
    if not emit_rows(rows, as_json, as_csv):
        console_of().print(table)


@inspect_app.command("summary")
def inspect_summary(store: StorePath = "traces", json_: JsonFlag = False) -> None:
    """Show teachers, verdicts, coverage and tokens of a store.

    Example: `ampo inspect store summary traces`
    """
    from store.reader import TraceStore
    from store.reports.report import store_report
    from store.reports.tables import summary_tables

    with TraceStore(store) as opened:
        report = store_report(opened)
    if json_:
        emit_json(asdict(report))
    else:
        console_of().print(summary_tables(report))


@inspect_app.command("traces")
def inspect_traces(
    store: StorePath = "traces",
    problem: Annotated[str | None, typer.Option(help="Only this problem_id; shows whole texts.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Only this teacher.")] = None,
    verdict: Annotated[str | None, typer.Option(help="Only this verdict, e.g. mismatch.")] = None,
    usable: Annotated[
        bool, typer.Option("--usable", help="Only verified traces that are not filtered.")
    ] = False,
    filtered: Annotated[
        bool, typer.Option("--filtered", help="Only filtered traces, with the reason.")
    ] = False,
    why: Annotated[
        bool, typer.Option("--why", help="Show gold and answer as written and as the verifier read them.")
    ] = False,
    limit: ShownRows = None,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """Read traces side by side; with `--why`, gold and answer as the verifier read them.

    Example: `ampo inspect store traces traces --problem 5f0c1d2e3a4b5c6d`

    Why answers failed: `ampo inspect store traces traces --verdict mismatch --why`
    """
    from store.format.reading import chosen_teachers
    from store.reader import TraceConditions, TraceStore
    from store.records import VERDICTS
    from store.reports.report import trace_row
    from store.reports.tables import traces_table, why_table

    if verdict is not None and verdict not in VERDICTS:
        raise UserError(f"--verdict {verdict}: one of {', '.join(VERDICTS)}")
    with TraceStore(store) as opened:
        wanted: TraceConditions = {
            "problem_id": problem,
            "teacher": teacher,
            "verdict": verdict,
            "usable": usable,
            "filtered": filtered,
        }
        total = opened.count(**wanted)
        if not total and teacher is not None:
            chosen_teachers(opened.path, [teacher])
        traces = opened.traces(**wanted, limit=row_limit(limit, table=20, programs=json_ or csv_))
        golds = {each.problem_id: each.answer for each in opened.problems()}
        if problem is not None and problem not in golds:
            raise UserError(f"--problem {problem}: no problem of {opened.path} has this problem_id")
        rows = [trace_row(trace) for trace in traces]
        if why:
            rows = [row | {"gold": golds.get(row["problem_id"])} for row in rows]
    _show(rows, why_table(rows) if why else traces_table(rows, full=problem is not None), json_, csv_)
    print_left_out(len(rows), total, "traces", programs=json_ or csv_)


@inspect_app.command("problems")
def inspect_problems(
    store: StorePath = "traces",
    uncovered: Annotated[
        bool, typer.Option("--uncovered", help="Only those without a usable trace of any teacher.")
    ] = False,
    limit: ShownRows = None,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """List problems, hardest first, with the teachers that solved them.

    Example: `ampo inspect store problems traces --uncovered`
    """
    from store.reader import TraceStore
    from store.reports.report import problem_rows
    from store.reports.tables import problems_table

    with TraceStore(store) as opened:
        rows = problem_rows(opened, uncovered=uncovered)
    shown = rows[: row_limit(limit, table=20, programs=json_ or csv_)]
    _show(shown, problems_table(shown), json_, csv_)
    print_left_out(len(shown), len(rows), "problems", programs=json_ or csv_)


@inspect_app.command("agreement")
def inspect_agreement(store: StorePath = "traces", json_: JsonFlag = False, csv_: CsvFlag = False) -> None:
    """Show pair by pair which teachers solve the same problems and share wrong answers.

    Example: `ampo inspect store agreement traces`
    """
    from store.reader import TraceStore
    from store.reports.agreement import agreement_table, agreements

    with TraceStore(store) as opened:
        pairs = agreements(opened)
    _show(pairs, agreement_table(pairs), json_, csv_)


@inspect_app.command("sql", epilog=views_help())
def inspect_sql(
    query: Annotated[str, typer.Argument(help="One SELECT, in DuckDB's SQL.")],
    store: StorePath = "traces",
    limit: ShownRows = None,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """Query the store in SQL, read-only; writers are not disturbed.

    A table has the first 100 rows; `--json` and `--csv` give every row, whole cells.

    Example: `ampo inspect store sql "SELECT teacher, avg(n_tokens) FROM traces GROUP BY teacher" traces`
    """
    from store.reader import TraceStore
    from store.reports.sql import StoreSql
    from store.reports.tables import sql_table

    most = row_limit(limit, table=100, programs=json_ or csv_)
    with TraceStore(store) as opened, StoreSql(opened) as views:
        with on_interrupt("the store is only read", stderr=True):
            result = views.query(query, limit=most)
        damaged = len(opened.damaged)
    if damaged:
        typer.echo(f"{damaged} damaged parts are left out; see `ampo store check`", err=True)
    _show(result.dicts(), sql_table(result.columns, result.rows, width=console_of().width), json_, csv_)
    if result.more:
        typer.echo(f"the first {most:,} rows; --limit 0 shows all", err=json_ or csv_)


@app.command("reindex")
def store_reindex(store: StorePath = "traces") -> None:
    """Rebuild the store's index from its parts.

    Example: `ampo store reindex traces`
    """
    from store.format.index import reindex
    from store.terminal.progress import Meter

    with Meter("indexing parts") as progress, reindex(store, progress=progress) as index:
        (traces,) = index.rows("SELECT count(*) AS traces, count(DISTINCT part) AS parts FROM idx.rows")
        damaged = index.damaged()
    print_line(f"indexed {traces['traces']:,} traces in {traces['parts']:,} parts")
    for part in damaged:
        print_line(f"[yellow]left out:[/] {escaped(part.part)}: {escaped(part.reason)}")


@app.command("check")
def store_check(
    store: StorePath = "traces",
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Move damaged and foreign files to quarantine/; resampling fills the gap."
        ),
    ] = False,
    json_: JsonFlag = False,
) -> None:
    """Read every byte of a store; list damaged files, lost traces, and the command that restores them.

    Exit code 1 when something is wrong. `--repair` deletes nothing.

    Example: `ampo store check traces --repair`
    """
    from store.reports.tables import check_table
    from store.terminal.progress import Meter
    from store.upkeep.checking import check

    with Meter("checking parts") as progress:
        report = check(store, repair=repair, progress=progress)
    if json_:
        emit_json(asdict(report) | {"lost": report.lost, "lost_verified": report.lost_verified})
    else:
        console_of().print(check_table(report, repaired=repair), soft_wrap=True)
    if report.findings and not repair:
        raise typer.Exit(1)


@app.command("compact")
def store_compact(store: StorePath = "traces") -> None:
    """Merge small parts into large ones, sorted by problem; readers are not disturbed.

    Example: `ampo store compact traces`
    """
    from store.terminal.progress import Meter
    from store.upkeep.compaction import compact

    with Meter("writing traces") as progress:
        report = compact(store, progress=progress)
    before, after = report.parts
    print_line(f"{report.traces:,} traces rewritten: {before:,} parts before, {after:,} now")


@app.command("forget")
def store_forget(
    teacher: Annotated[str, typer.Option(help="The teacher to remove.")],
    store: StorePath = "traces",
    failed: Annotated[
        bool, typer.Option("--failed", help="Only samples that failed, to try them again.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove them; without it they are only counted.")
    ] = False,
) -> None:
    """Remove every trace of one teacher, and its record.

    Example: `ampo store forget traces --teacher r1-distill --yes`
    """
    from store.reader import TraceStore
    from store.terminal.progress import Meter
    from store.upkeep.compaction import forget

    if not (failed or yes):
        with TraceStore(store) as opened:
            count, right = opened.count(teacher=teacher), opened.count(teacher=teacher, verdict="match")
        if count:
            raise UserError(
                f"this removes {count:,} traces of {teacher} ({right:,} verified) from {opened.path} "
                "for good; add --yes to do it"
            )
    with Meter("writing traces") as progress:
        forget(store, teacher, failed=failed, progress=progress)
    print_line(f"forgot {'the failed samples of ' if failed else ''}{teacher}")


_FORMS = (
    "verl: a row a problem with target_lst; luffy: a row a trace with target; chat: messages for supervised "
    "training; dpo: prompt, chosen, rejected; trl: prompt, solution; hf: a row a trace for "
    "datasets.load_dataset; or your own file.py:function."
)
_SYSTEM = "Replaces every system turn, '' for none; default: the problem's, in chat the teacher's."


@app.command("export")
def store_export(
    to: Annotated[str, typer.Option(help=_FORMS)],
    out: Annotated[Path, typer.Option(help="A new .parquet or .jsonl file.")],
    store: StorePath = "traces",
    only_verified: Annotated[
        bool,
        typer.Option("--only-verified/--all", help="Only usable traces; or wrong and filtered ones too."),
    ] = True,
    teacher: Annotated[list[str] | None, typer.Option(help="Only this teacher. May be repeated.")] = None,
    max_per_problem: Annotated[
        int | None,
        typer.Option(min=1, help="At most N traces (dpo: pairs) of a problem; the teachers take turns."),
    ] = None,
    system_prompt: Annotated[str | None, typer.Option(help=_SYSTEM)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    json_: JsonFlag = False,
) -> None:
    """Write a store's traces in another program's form: verl, LUFFY, chat messages, DPO pairs, TRL prompts,
    Hugging Face datasets.

    The output appears whole or not at all.

    Example: `ampo store export traces --to verl --out train.parquet --max-per-problem 4`
    """
    from store.export.export_forms import ExportOptions
    from store.export.exporting import export
    from store.reader import TraceStore
    from store.terminal.progress import Meter

    options = ExportOptions(
        everything=not only_verified,
        teachers=tuple(teacher or ()),
        max_per_problem=max_per_problem,
        system_prompt=system_prompt,
        overwrite=overwrite,
    )
    with (
        on_interrupt(f"{out} was not written", stderr=True),
        TraceStore(store) as opened,
        Meter("exporting") as meter,
    ):
        report = export(opened, out, to, options, progress=meter)
    if json_:
        emit_json(asdict(report))
    else:
        print_line(report.line)
