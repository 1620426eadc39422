"""Tables for a person: never cut off, however narrow the terminal or the log file."""

from rich.console import Console
from rich.table import Table


def print_table(table: Table, *notes: str) -> None:
    """Prints a table at its full width, then notes as lines."""
    console = Console()
    needed = Console(width=10_000).measure(table).maximum  # a console measures no wider than it is
    wide = Console(width=max(console.width, needed))
    wide.print(table)
    for note in notes:
        wide.print(note, highlight=False, markup=False, soft_wrap=True)
