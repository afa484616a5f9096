"""What a merge is and costs, shown to people. Nothing here changes an adapter."""
