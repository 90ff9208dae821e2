"""Checkpoints and the lease that says who may write them."""
