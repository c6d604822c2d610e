"""`ampo store refilter`: the stored traces under other filters."""

from __future__ import annotations

from typing import Annotated

import typer

from commands.progress import Meter
from commands.shared import ConfigOption, SetOption, console_of, read_config, told_with_config
from store.errors import ConfigError


def store_refilter(
    store: Annotated[
        str | None, typer.Argument(help="The store's directory; default: the config's store.path.")
    ] = None,
    teacher: Annotated[
        list[str] | None, typer.Option(help="Only this teacher. May be repeated; default: all.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Judge the stored traces by the config's [filters]; nothing is drawn or verified again.

    What a filter holds back stays in the store with the reason, and never reaches the student. Without
    `--config` the filters must be named: `--set filters.max_tokens=4096`, or `=none` to lift all of them.

    Example: `ampo store refilter --config configs/lab.toml --set filters.max_tokens=4096`
    """
    from precompute.refilter import refilter
    from precompute.tables import refilter_table

    if config is None and not any(each.strip().startswith("filters.") for each in set_ or ()):
        raise ConfigError(
            "no [filters] given, which would lift all that the store has: give --config FILE, or name them "
            "by --set, e.g. --set filters.max_tokens=4096 (--set filters.max_tokens=none lifts all)"
        )
    settings, console = read_config(config, set_), console_of()
    try:
        with told_with_config(config), Meter("judging traces") as meter:
            path = store or settings.store.path
            reports = refilter(path, settings.filters, teachers=teacher, progress=meter)
    except KeyboardInterrupt:
        console.print("\ninterrupted; nothing is lost. Go on with the same command.")
        raise typer.Exit(130) from None
    console.print(refilter_table(reports))
