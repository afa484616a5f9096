"""What PEFT puts into a model for the type MANY: config, tuner, routed projector and gated LoRA.

Modules that stand in place of a model's own enter, and what makes PEFT know of them; nothing here measures or merges.
"""
