"""Sweeps: runs of one config that differ in chosen settings and in the seed. A sweep's own process imports no torch."""
