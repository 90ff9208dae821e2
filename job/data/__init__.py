"""Data: layout, splits, checks, and the streams of training images."""
