"""The mathematics of MAny: pure functions and small value classes over tensors. Imports torch and nothing above it."""
