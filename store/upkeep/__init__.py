"""Checks and rewrites of a store."""
