"""`ampo store`: care for a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from commands.progress import Meter
from commands.shared import JsonFlag, StorePath, console_of, emit_json, escaped

if TYPE_CHECKING:
    from rich.console import Console

    from store.compaction import CompactionReport
    from store.parts import DamagedPart

app = typer.Typer(no_args_is_help=True, help="Care for a store.")


@app.command("reindex")
def store_reindex(store: StorePath = "traces") -> None:
    """Make the store's index anew from its parts.

    Example: `ampo store reindex traces`
    """
    from store.index import reindex

    with Meter("indexing parts") as progress:
        report = reindex(store, progress=progress)
    console = console_of()
    console.print(
        f"indexed {report.traces:,} traces in {report.parts} parts, {report.seconds:.1f} s", highlight=False
    )
    _say_left_out(console, report.damaged)


@app.command("check")
def store_check(
    store: StorePath = "traces",
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Set aside what is damaged or foreign, so that it can be made again."),
    ] = False,
    json_: JsonFlag = False,
) -> None:
    """Read every byte of a store; say what is damaged, what is lost, and how to make exactly that again.

    Exit code 1 when something is wrong. `--repair` deletes nothing: what it takes out goes to `quarantine/`.

    Example: `ampo store check traces --repair`
    """
    from dataclasses import asdict

    from store.check_table import check_table
    from store.checking import check

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
    """Merge small parts into large ones, sorted by problem, while readers go on reading.

    Example: `ampo store compact traces`
    """
    from store.compaction import compact

    with Meter("writing traces") as progress:
        report = compact(store, progress=progress)
    _say_rewritten(report, nothing="nothing to do: the store is compact")


@app.command("forget")
def store_forget(
    teacher: Annotated[str, typer.Option(help="Whose traces go.")], store: StorePath = "traces"
) -> None:
    """Remove every trace of one teacher, and its record.

    Example: `ampo store forget traces --teacher r1-distill`
    """
    from store.compaction import forget

    with Meter("writing traces") as progress:
        report = forget(store, teacher, progress=progress)
    _say_rewritten(report, nothing=f"forgot {teacher}")


@app.command("migrate")
def store_migrate(store: StorePath = "traces") -> None:
    """Bring a store that an earlier version wrote to this version's form.

    Example: `ampo store migrate traces`
    """
    from store.migration import migrate

    with Meter("rewriting parts") as progress:
        report = migrate(store, progress=progress)
    console = console_of()
    if not report.parts and not report.damaged:
        console.print(f"nothing to do: schema version {report.to_version}", highlight=False)
        return
    console.print(
        f"schema version {report.from_version} -> {report.to_version}: {report.traces:,} traces in "
        f"{report.parts} parts",
        highlight=False,
    )
    _say_left_out(console, report.damaged, "; `ampo store check --repair` sets it aside")


def _say_left_out(console: Console, damaged: Sequence[DamagedPart], way_out: str = "") -> None:
    for part in damaged:
        console.print(
            f"[yellow]left out:[/] {escaped(part.part)}: {escaped(part.reason)}{way_out}",
            highlight=False,
            soft_wrap=True,
        )


def _say_rewritten(report: CompactionReport, *, nothing: str) -> None:
    if not report.traces:
        console_of().print(nothing, highlight=False)
        return
    console_of().print(
        f"{report.traces:,} traces written anew: {report.parts_before} parts of "
        f"{report.bytes_before / 2**20:,.1f} MiB are {report.parts_after} of "
        f"{report.bytes_after / 2**20:,.1f} MiB",
        highlight=False,
        soft_wrap=True,
    )
