"""The offline stage: teachers solve problems, every solution is verified, the traces go into the store."""
