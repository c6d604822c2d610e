"""The `ampo` command; mounts the commands of precompute/, store/, trainer/ and lab/.

ampo precompute teachers     teachers solve problems; verified traces go into the store
ampo train                   the student samples, queries the store where all failed, learns
ampo inspect store queries   what the trainer queried, what came back, what it used
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version as package_version
from typing import Annotated

import typer

from lab import cli as lab
from precompute import cli as precompute
from store import cli as store
from store.errors import UserError
from store.terminal.console import print_error
from trainer import cli as trainer

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Multi-teacher reinforcement learning without a cluster (AMPO, arXiv 2510.02227).",
)
inspect_app = typer.Typer(no_args_is_help=True, help="Look into stores and runs.")
app.command()(lab.init)
app.add_typer(precompute.app, name="precompute")
app.command()(trainer.train)
app.command("eval")(trainer.evaluate)
app.command()(precompute.verify)
app.command()(trainer.report)
app.add_typer(trainer.model_app, name="model")
app.add_typer(inspect_app, name="inspect")
inspect_app.add_typer(store.inspect_app, name="store")
store.inspect_app.command("queries")(trainer.inspect_queries)
inspect_app.command("run")(trainer.inspect_run)
app.add_typer(store.app, name="store")
store.app.command("refilter")(precompute.store_refilter)
store.app.command("reverify")(precompute.store_reverify)
store.app.command("import")(precompute.store_import)
app.add_typer(lab.app, name="lab")


def main() -> None:
    """Entry point: a user's error is one line and exit code 2."""
    # Before torch loads OpenMP: threads that spin while they wait make a step 10 to 15 times slower as soon
    # as anything else (our own verifier's workers, say) wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # At import it reports a faster kernel that nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.argv[1:] = map(_home_expanded, sys.argv[1:])
    try:
        app()
    except UserError as error:
        print_error(error)
        sys.exit(2)
    except BrokenPipeError:
        # `ampo ... | head` closes the pipe; that is the reader's good right.
        sys.stderr.close()
        sys.exit(0)


def _home_expanded(argument: str) -> str:
    """Returns `--out=/home/me/x` for `--out=~/x`, which a shell leaves as it is, unlike `--out ~/x`."""
    if not argument.startswith("--"):
        return os.path.expanduser(argument)
    option, equals, value = argument.partition("=")
    return option + equals + os.path.expanduser(value)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"ampo {package_version('ampo-rl')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Multi-teacher reinforcement learning without a cluster (AMPO, arXiv 2510.02227)."""


if __name__ == "__main__":
    main()
