"""What merging takes on a GPU: a script that measures it, and counting that stands in where there is no GPU."""
