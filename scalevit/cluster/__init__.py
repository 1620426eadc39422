"""A run's processes on its machines. Knows environment variables and processes; must not know torch or training."""
