"""A task's data in formats that people have: conversations read, images opened, batches made by a chat template.

Formats and scores of answers enter; nothing here knows what an adapter or a merge is.
"""
