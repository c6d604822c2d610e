"""What every command shares: options, the config, output for people and for programs."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from store.errors import StoreMissingError, UserError, missing_store

if TYPE_CHECKING:
    from rich.console import Console

UNFOLDED = 100_000
"""Characters of a line, where no terminal sets an end to it."""
ConfigOption = Annotated[
    str | None, typer.Option("--config", "-c", help="A TOML file; without it the defaults alone.")
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


def print_config(console: Console, toml: str) -> None:
    console.print("[bold]resolved config[/]")
    console.print(escaped(toml), highlight=False, soft_wrap=True)


def console_of(*, stderr: bool = False) -> Console:
    """As wide as the terminal, or as COLUMNS says; in a file or a pipe nothing is cut or folded."""
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNFOLDED
    return console


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def say_error(error: UserError) -> None:
    """One line on stderr."""
    console_of(stderr=True).print(f"[red]error:[/] {escaped(str(error))}", highlight=False, soft_wrap=True)


def with_config(error: UserError, config: str | None) -> UserError:
    """The error; of a store that is missing, with the config that this command was given in its hint."""
    if isinstance(error, StoreMissingError) and error.root is not None:
        return missing_store(error.root, config)
    return error


@contextmanager
def told_with_config(config: str | None) -> Iterator[None]:
    """Errors of the block as `with_config` tells them."""
    try:
        yield
    except StoreMissingError as error:
        raise with_config(error, config) from None


def emit_rows(rows: Sequence[Mapping[str, Any]], as_json: bool, as_csv: bool) -> bool:
    """Writes rows for programs where that was asked; says whether it did."""
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


def emit_json(body: Any) -> None:
    json.dump(body, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")
