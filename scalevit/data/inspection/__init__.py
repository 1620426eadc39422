"""What a set of shards holds: a survey of its images, and a sheet of samples as a run sees them."""
