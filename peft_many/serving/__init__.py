"""What a server loads: routed projectors for vLLM, as a plugin that it finds by itself. Nothing here imports PEFT."""
