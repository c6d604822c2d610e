"""Shared by all commands: options, consoles, output for programs."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from store.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 100_000
"""Characters of a line where no terminal limits them."""

ConfigOption = Annotated[
    list[str] | None,
    typer.Option("--config", "-c", help="A TOML file; repeated, later ones over earlier ones."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Overrides one key, e.g. `--set train.max_steps=100`. May be repeated."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, show what would happen, touch nothing.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="JSON for programs instead of a table.")]
CsvFlag = Annotated[bool, typer.Option("--csv", help="CSV for programs instead of a table.")]
StorePath = Annotated[str, typer.Argument(help="The store's directory.")]
ShownRows = Annotated[
    int | None,
    typer.Option(
        "--limit", min=0, help="At most N rows; 0: all. Default: some in a table, all for programs."
    ),
]


def console_of(*, stderr: bool = False) -> Console:
    """Returns a console as wide as the terminal or COLUMNS; in a file or a pipe no line is folded."""
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def escaped(text: str) -> str:
    """Returns the text with rich's markup escaped."""
    from rich.markup import escape

    return escape(text)


def print_line(markup: str) -> None:
    """Prints one line on stdout."""
    console_of().print(markup, highlight=False, soft_wrap=True)


@contextmanager
def on_interrupt(message: str, *, stderr: bool = False) -> Iterator[None]:
    """On Ctrl-C or SIGTERM prints a line about the work so far and exits with code 130."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        console_of(stderr=stderr).print(f"\ninterrupted; {message}.", highlight=False)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def print_config(console: Console, toml: str) -> None:
    """Prints the resolved config."""
    console.print("[bold]resolved config[/]")
    console.print(escaped(toml), highlight=False, soft_wrap=True)


def print_error(error: UserError) -> None:
    """Prints the error as one line on stderr."""
    console_of(stderr=True).print(f"[red]error:[/] {escaped(str(error))}", highlight=False, soft_wrap=True)


def emit_rows(rows: Sequence[Mapping[str, Any]], as_json: bool, as_csv: bool) -> bool:
    """Writes rows as JSON or CSV where one is requested; returns whether it did."""
    if as_json and as_csv:
        raise UserError("--json and --csv exclude each other: give one of them")
    if as_json:
        emit_json(list(rows))
    elif as_csv:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(sys.stdout, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
    return as_json or as_csv


def row_limit(limit: int | None, *, table: int, programs: bool) -> int | None:
    """Returns the number of rows to show, None for all: `--limit`, else `table` in a table and all rows as
    JSON or CSV."""
    if limit is None:
        limit = 0 if programs else table
    return limit or None


def print_left_out(shown: int, total: int, kind: str, *, programs: bool) -> None:
    """Prints how many rows are left out, if any; on stderr where stdout holds JSON or CSV."""
    if shown < total:
        line = f"{shown:,} of {total:,} {kind} shown; {total - shown:,} left out; --limit 0 shows all"
        console_of(stderr=programs).print(line, highlight=False, soft_wrap=True)


def emit_json(body: Any) -> None:
    """Writes JSON on stdout."""
    json.dump(body, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")
