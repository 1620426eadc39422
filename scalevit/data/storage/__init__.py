"""Bytes of files and of addresses."""
