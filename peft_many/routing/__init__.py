"""Which images belong to which row of a running call, between the projector that routes and the LoRA that follows it.

Models are watched here while they run; nothing is merged, measured or read from files.
"""
