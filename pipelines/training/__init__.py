"""Training denoisers, with or without a sparse attention method: tasks, losses, checkpoints and the loop."""
