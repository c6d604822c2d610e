"""The `ampo` command."""
