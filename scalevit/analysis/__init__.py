"""Trained models: what their MLPs have in common, and how to reduce them."""
