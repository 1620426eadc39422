"""One run from its config to its end. Knows every room below it; names no Part."""
