"""Tuning: tables of launch configurations for each device (`tables`), and the tuner that measures them (`tuner`)."""
