"""Shards in, batches out. Knows files, bytes, tensors and two integers (rank, world size); not models or engines."""
