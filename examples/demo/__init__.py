"""The demo: a tiny LLaVA learns conflicting image-question tasks, is merged, and is asked what it remembers.

Run it from the top of the repository: `make demo`, or `python -m examples.demo` after `pip install -e '.[demo]'`.
"""
