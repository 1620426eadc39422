"""The `scalevit` command: arguments in, one library call, printing. One file per command."""
