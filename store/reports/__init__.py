"""Reports on a store."""
