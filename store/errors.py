"""What can go wrong, in the user's words.

UserError                    anything a user can mend: one line, exit code 2
  ConfigError                a config key, value or file
  ProblemsError              a problem file or a row of it
  EngineError                an engine that cannot be used here, or a model that cannot be loaded
  StoreError                 the trace store
    StoreMissingError        no store at that path
    StoreForeignError        a directory that is no trace store
    StoreVersionError        written by a version of ampo with another schema
    StoreDamagedError        a file of the store cannot be read
    StoreBusyError           another process is writing
    RecipeChangedError       one teacher name, two generation recipes
  RunError                   a run directory: missing, foreign, or not resumable
  TrainingError              a step that cannot be computed: out of memory, or not a number

Every message is one line that names the culprit, its value and what would be right.
"""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """Something the user can mend; the command line prints it as one line and exits with 2."""


class ConfigError(UserError):
    """A key, a value or a file of the configuration."""


class ProblemsError(UserError):
    """A problem file that cannot be read, or a row of it that is no problem."""


class EngineError(UserError):
    """An engine that cannot be used here, or a model that cannot be loaded."""


class StoreError(UserError):
    """The trace store cannot do what was asked."""


class StoreMissingError(StoreError):
    """There is no store at `root`."""

    root: Path | None = None


def missing_store(root: Path, config: str | None = None) -> StoreMissingError:
    """The error, with what makes a store; `config`: the file that a command was given."""
    teachers = "ampo precompute teachers" + (f" --config {config}" if config else "")
    error = StoreMissingError(
        f"no trace store at {root}; make one with `{teachers}`, or with `ampo store import` from traces that "
        "are there"
    )
    error.root = root
    return error


class StoreForeignError(StoreError):
    """The directory holds something that is no trace store."""


class StoreVersionError(StoreError):
    """The store was written by a version of ampo with another schema."""


class StoreDamagedError(StoreError):
    """A file of the store cannot be read; the message names it and the way out."""


class StoreBusyError(StoreError):
    """Another process holds the store's write lock."""


class RecipeChangedError(StoreError):
    """The store already holds traces of this teacher name made with another recipe."""


class RunError(UserError):
    """A run directory is missing, foreign, or cannot be resumed."""


class TrainingError(UserError):
    """A training step that cannot be computed; the message says what to change and where to go on."""
