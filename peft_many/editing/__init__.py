"""What is done to a merge afterwards: tasks are added, removed, weighted anew and pooled, and merges refitted.

What makes another merge of a merge, or a pool, enters; how adapters are merged is in `merging`.
"""
