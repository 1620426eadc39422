"""Whole sets of shards from folders, CSV files, other shards and Hugging Face data sets."""
