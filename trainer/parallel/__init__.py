"""Training on several devices with torchrun."""
