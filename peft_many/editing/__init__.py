"""What is done to a merge afterwards: tasks are added, removed, pooled, and refitted."""
