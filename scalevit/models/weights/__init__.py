"""Weights files: read, matched to a model, written."""
