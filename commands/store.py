"""`ampo store`: care for a store."""

from __future__ import annotations

import typer

from commands.shared import StorePath, console_of, escaped

app = typer.Typer(no_args_is_help=True, help="Care for a store.")


@app.command("reindex")
def store_reindex(store: StorePath = "traces") -> None:
    """Make the store's index anew from its parts.

    Example: `ampo store reindex traces`
    """
    from store.index import reindex

    report = reindex(store)
    console = console_of()
    console.print(
        f"indexed {report.traces:,} traces in {report.parts} parts, {report.seconds:.1f} s", highlight=False
    )
    for part in report.damaged:
        console.print(f"[yellow]left out:[/] {escaped(str(part))}", highlight=False, soft_wrap=True)
