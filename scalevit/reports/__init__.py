"""Results of runs: sweeps that make them, what they say (tables, tests, figures), and a page for people.

Knows the files of run folders, configs and processes. Must not know torch, or how a run is trained.
"""
