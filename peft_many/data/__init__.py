"""A task's data in formats that people have: conversations read, images opened, batches made by a chat template."""
