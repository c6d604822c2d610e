"""`ampo inspect run`: curves of one run or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.shared import CsvFlag, JsonFlag, console_of, emit_rows


def inspect_run(
    runs: Annotated[list[str] | None, typer.Argument(help="Run directories; default: the last one.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the curves of all runs into this PNG.")] = None,
    json_: JsonFlag = False,
    csv_: CsvFlag = False,
) -> None:
    """Show a run's curves as text, or several runs side by side and in one PNG.

    Example: `ampo inspect run runs/lab-ampo runs/lab-grpo --png curves.png`
    """
    from trainer.plot import plot_runs
    from trainer.run_files import latest_run, open_run
    from trainer.tables import comparison_table, curves_table, evaluations_table, time_line

    paths = runs or [str(latest_run("runs"))]
    opened = [open_run(path) for path in paths]
    names = [run.root.name for run in opened]
    # Two runs may have one name in two folders.
    shown = names if len(set(names)) == len(names) else paths
    found = {name: run.metrics() for name, run in zip(shown, opened, strict=True)}
    if png is not None:
        plot_runs(found, png)
    if emit_rows([{"run": name, **row} for name, rows in found.items() for row in rows], json_, csv_):
        return
    console = console_of()
    if len(found) > 1:
        console.print(comparison_table(found))
    for name, rows in found.items():
        if len(found) == 1:
            console.print(curves_table(name, rows))
        console.print(f"{name}: {time_line(rows)}", highlight=False, markup=False)
    console.print(evaluations_table(found))
    if png is not None:
        console.print(f"drew {png}", highlight=False)
