"""The sub-commands of `ampo`, one file a group; what is heavy is imported inside the functions."""
