"""Merges shipped, proved and calibrated."""
