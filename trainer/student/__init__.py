"""The model that learns: loading, log-probabilities, batches, optimizer."""
