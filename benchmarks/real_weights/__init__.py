"""Weights that were really pre-trained, pictures that nobody here drew: `python -m benchmarks.real_weights`."""
