"""What a run leaves behind: its folder, environment, summary and trackers. Knows files, JSON and records; not torch."""
