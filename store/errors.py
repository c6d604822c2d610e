"""The errors of all packages, in the user's words: one line that names the culprit, its value and what would
be right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can fix; the command line prints it as one line and exits with 2."""


class ConfigError(UserError):
    """A key, a value or a file of the configuration."""


class ProblemsError(UserError):
    """A problem file that cannot be read, or an invalid row of it."""


class EngineError(UserError):
    """An engine that cannot be used here, or a model that cannot be loaded."""


class StoreError(UserError):
    """An operation of the trace store that is not possible."""


class StoreMissingError(StoreError):
    """No store at that path."""


class StoreForeignError(StoreError):
    """A directory with other content than a trace store."""


class StoreVersionError(StoreError):
    """The store was written by a version of ampo with another schema."""


class StoreDamagedError(StoreError):
    """A file of the store cannot be read; the message names it and the way out."""


class StoreBusyError(StoreError):
    """Another process has the store's write lock."""


class RecipeChangedError(StoreError):
    """The store already has traces of this teacher name from another recipe."""


class RunError(UserError):
    """A run directory is missing, foreign, or cannot be resumed."""


class TrainingError(UserError):
    """A training step that cannot be computed; the message names the remedy."""


def install_hint(extra: str) -> str:
    """Returns the command that installs one of our extras; it works in a checkout."""
    return f'pip install -e ".[{extra}]"'


@contextmanager
def prefixed(prefix: str, kind: type[UserError]) -> Iterator[None]:
    """Puts what it is about, e.g. a config key, before an error of this kind in the block."""
    try:
        yield
    except kind as error:
        raise kind(f"{prefix}: {error}") from error
