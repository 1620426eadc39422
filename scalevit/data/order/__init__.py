"""Which sample comes when, and on which rank and row. Arithmetic alone."""
