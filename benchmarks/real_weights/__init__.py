"""Merging on weights that were really pre-trained and pictures that nobody here drew: `python -m benchmarks.real_weights`."""
