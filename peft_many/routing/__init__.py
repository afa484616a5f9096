"""Which images belong to which row of a running call. Models are watched here; nothing is merged or measured."""
