"""Training: losses, step, state, loop, evaluation."""
