"""Results of finished runs: sweeps of runs, and what is reported of them. Must not know the trainer's inside."""
