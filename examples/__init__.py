"""Whole scripts to copy from, and the demo: `python -m examples.demo`. Run from a checkout."""
