"""One run of `ampo precompute teachers`."""
