"""Pixels to augmented pixels, and what is left to the device."""
