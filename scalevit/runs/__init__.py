"""What a run leaves behind: its folder, records, summary and environment, and the trackers that records are sent to.

Knows files, JSON and records; must not know torch, training or sections of the config.
"""
