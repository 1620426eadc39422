"""Processes on this machine, and the cores and GPUs that they get.

Knows processes and environment variables; must not know torch or training.
"""
