"""Where the samples of new shards come from: one file for each kind of source."""
