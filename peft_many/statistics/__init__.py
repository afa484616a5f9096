"""`collect_statistics`: hooks that see inputs pass by, and what is made of them."""
