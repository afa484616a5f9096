"""The demo: a tiny LLaVA learns conflicting image-question tasks, is merged, and is asked what it remembers.

Run it with `python -m examples.demo`. It needs the extra `peft-many[demo]`.
"""
