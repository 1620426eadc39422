"""Sweeps: runs of one config that differ in chosen settings and in the seed. The sweep's own process imports no torch."""
