"""Traces from other people's files."""
