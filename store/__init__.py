"""The trace store: verified teacher solutions as plain Parquet, found through a disposable DuckDB index."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from store.reader import TraceStore
    from store.records import Problem, TeacherRecord, Trace
    from store.writer import StoreWriter

__all__ = ["Problem", "StoreWriter", "TeacherRecord", "Trace", "TraceStore"]
_HOMES = {"TraceStore": "reader", "StoreWriter": "writer"}


def __getattr__(name: str) -> Any:
    """Imports on demand: the command line must not load duckdb and pyarrow to print its help."""
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"store.{_HOMES.get(name, 'records')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
