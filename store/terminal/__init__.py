"""Output on a terminal: options, tables, progress."""
