"""The PEFT plugin and the adapter on disk. Imports the mathematics below it, and nothing of what people call above."""
