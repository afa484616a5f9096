"""What merging costs (scripts), and what it is worth: `python -m benchmarks.mini_ucit`. Run from a checkout."""
