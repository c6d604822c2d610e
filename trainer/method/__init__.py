"""The method of the paper: groups, guidance, loss and update."""
