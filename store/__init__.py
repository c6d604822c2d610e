"""The trace store: verified teacher solutions as plain Parquet, found through a disposable DuckDB index."""
