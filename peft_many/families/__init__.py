"""Where a model keeps its parts, and how its images lie in a tensor. What structure does not tell is a row here."""
