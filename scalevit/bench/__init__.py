"""Benchmarks of the loaders and of training, beside timm and eager PyTorch."""
