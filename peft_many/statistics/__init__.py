"""`collect_statistics`: hooks that see inputs pass by, and what is made of them.

What watches a model in order to measure it enters; nothing here merges, and sums over inputs are formed in `algebra`.
"""
