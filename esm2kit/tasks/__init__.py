"""Labelled tasks: FLIP and custom data, metrics with intervals, and batches for training."""
