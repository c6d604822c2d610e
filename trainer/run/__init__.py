"""A run on disk: set-up, directory, checkpoints."""
