"""Samples in tar files: discovery, index, verification."""
