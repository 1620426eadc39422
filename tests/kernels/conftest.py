"""Kernel tests. Keeping this file here also puts `kernel_cases` on the path of the folders below."""
