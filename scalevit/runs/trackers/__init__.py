"""Trackers, one file each. A new one is its file and one line here."""

from scalevit.runs.trackers.wandb_tracker import WandbTracker

TRACKERS = (WandbTracker,)
