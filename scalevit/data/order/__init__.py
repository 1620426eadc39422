"""Which sample is at which position, and on which rank and row. Arithmetic only."""
