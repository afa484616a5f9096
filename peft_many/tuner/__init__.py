"""What PEFT puts into a model for the type MANY: config, tuner, routed projector and gated LoRA."""
