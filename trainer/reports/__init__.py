"""Reports on runs: tables and plots."""
