"""The seam of trackers: where a run's records go beside its folder. Knows records; must not import a tracker's library
at module level."""

from scalevit.config.base import Part


class Tracker(Part):
    """One place that records are sent to; off unless `enabled`."""

    name: str
    enabled: bool = False
    """Send the records of a run there."""
