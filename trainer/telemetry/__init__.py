"""Output while a run trains: metrics, performance, console, trackers."""
