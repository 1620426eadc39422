"""Checkpoints: one form for every engine and world size, written by all ranks beside the training, without pickle."""
