"""The config: sections, the tree, and how files, overrides and presets become one. Imports no torch."""
